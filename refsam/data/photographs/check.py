"""Checks a folder of photographs: lists, files, masks, classes and licences, all problems at once."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refsam.data.dataset import DataError, image_size, read_image
from refsam.data.masks import read_numbers
from refsam.data.photographs.folder import PARTS, UNSURE, read_lines, read_names
from refsam.data.photographs.words import load_words

FIELDS = ("image", "label", "source", "licence", "split")
_SHARE_TOLERANCE = 0.02  # of the area, between a class's share in the list and in the label
# Field of each list -> the part of the report that it belongs to.
_MAPS = {"label": "labels", "instances": "instances", "parts": "parts"}
_PARTS_OF = {
    "photographs": {"image": "photographs", **_MAPS},
    "backgrounds": {"image": "backgrounds"},
}


@dataclass
class Report:
    """Findings on one part of a folder: number of files, a remark, and every problem."""

    count: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_folder(
    root: Path, decode: bool = False, advance: Callable[[], None] = lambda: None
) -> Mapping[str, Mapping[str, Report]]:
    """Reports by split and part; with `decode` every image is decoded, too. `advance` is called after every photograph.

    Masks and the headers of images are always read. A file that cannot be read is reported as a problem and raises nothing.
    """
    names, classes = _check_classes(root / "classes.json")
    lists = Report()
    splits = {"every": defaultdict(Report, classes=classes, lists=lists)}
    for kind, listing in (("photographs", "manifest.jsonl"), ("backgrounds", "backgrounds.jsonl")):
        if kind == "backgrounds" and not (root / listing).is_file():
            continue
        count = 0
        for count, row in enumerate(_rows(root / listing, lists), 1):
            reports = splits.setdefault(str(row.get("split", "no split")), defaultdict(Report))
            for field_name, part in _PARTS_OF[kind].items():
                if row.get(field_name):
                    reports[part].count += 1
            for part, problem in _check_row(root, kind, f"{listing}, line {count}", row, names):
                reports[part].problems.append(problem)
            if decode and isinstance(row.get("image"), str):
                with _told(reports[kind]):
                    read_image(root / row["image"])
            advance()
        lists.notes.append(f"{count} {kind}")
    return splits


@contextmanager
def _told(report: Report) -> Iterator[None]:
    """Report what cannot be read as a problem."""
    try:
        yield
    except DataError as error:
        report.problems.append(str(error))


def _rows(path: Path, report: Report) -> Iterator[dict[str, Any]]:
    with _told(report):
        yield from read_lines(path)


def _check_classes(path: Path) -> tuple[Mapping[int, str], Report]:
    try:
        names = read_names(path)
    except DataError as error:
        return {}, Report(problems=[str(error)])
    words = load_words()
    own = sorted({words.class_of(n) for n in names.values()} - {*words.classes, *words.garments})
    notes = [f"no words of the list: {', '.join(own)}"] if own else []
    problems = [f"number {n} of {names[n]}: want 1 to 254" for n in names if not 0 < n < UNSURE]
    return names, Report(len(names), notes, problems)


def _check_row(
    root: Path, kind: str, place: str, row: dict[str, Any], names: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    """(part, problem) of one line of a list and of the files that it names."""
    wanted = [f for f in FIELDS if not (kind == "backgrounds" and f == "label")]
    missing = [f for f in wanted if not (isinstance(row.get(f), str) and row[f].strip())]
    if missing:
        yield kind, f"{place}: {row.get('image', 'no image')}: no {', '.join(missing)}"
    size, maps = None, dict[str, NDArray[np.uint8]]()
    for name, part in _PARTS_OF[kind].items():
        if not isinstance(row.get(name), str):
            continue
        try:
            if name == "image":
                size = image_size(_inside(root, row[name]))
            else:
                maps[name] = read_numbers(_inside(root, row[name]))
        except DataError as error:
            yield part, str(error)
    stated = row.get("height"), row.get("width")
    if size is not None and None not in stated and stated != size:
        listed = f"{stated[1]}x{stated[0]} are listed"
        yield kind, f"{place}: {listed}, {row['image']} is {size[1]}x{size[0]}"
    for name, numbers in list(maps.items()):
        if size is not None and numbers.shape != size:
            height, width = maps.pop(name).shape
            differs = f"{row[name]} is {width}x{height}, its image {size[1]}x{size[0]}"
            yield _MAPS[name], f"{differs} (width x height)"
    if "label" in maps:
        yield from _check_maps(row, maps, names)


def _check_maps(
    row: dict[str, Any], maps: dict[str, NDArray[np.uint8]], names: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    """(part, problem) of label, instances and parts of one photograph, which have its size."""
    labels, file = maps["label"], row["label"]
    counts = np.bincount(labels.ravel(), minlength=256)
    shown = {int(n) for n in np.flatnonzero(counts)} - {0, UNSURE}
    if unknown := sorted(shown - names.keys()):
        yield "labels", f"{file}: {_numbers(unknown)} not in classes.json"
    if not shown:
        yield "labels", f"{file}: shows no class"
    try:
        listed = {int(n): float(share) for n, share in (row.get("classes") or {}).items()}
    except (AttributeError, TypeError, ValueError):
        yield "labels", f"{file}: classes are {row['classes']!r}, want a share for each number"
        listed = {}
    for number in sorted(listed.keys() | shown if listed else ()):
        told = listed.get(number, 0.0)
        found = counts[number] / labels.size if number in shown else 0.0
        if abs(told - found) > _SHARE_TOLERANCE:
            yield "labels", f"{file}: class {number} covers {found:.3f}, {told:.3f} is listed"
    objects = maps.get("instances", np.zeros_like(labels))
    outside = np.unique(objects[(labels == 0) & (objects != 0) & (objects != UNSURE)])
    if len(outside):
        place = f"{_numbers(outside)} where the label shows nothing"
        yield "instances", f"{row['instances']}: {place}"
    if "parts" in maps and (wrong := np.unique(maps["parts"][maps["parts"] > len(PARTS)])).size:
        yield "parts", f"{row['parts']}: {_numbers(wrong)}, want 0 to {len(PARTS)}"


def _inside(root: Path, name: str) -> Path:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{name}: lies outside {root}")
    return path


def _numbers(values: Any) -> str:
    named = ", ".join(str(int(v)) for v in values[:5])
    return f"number {named}{' and more' if len(values) > 5 else ''}"
