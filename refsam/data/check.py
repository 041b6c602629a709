"""Check a dataset: present, missing and broken files, and where to get them."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from refsam.data.catalogue import DATASETS, open_dataset
from refsam.data.dataset import DataError, ReferringDataset, UnreadableError, VideoRecord
from refsam.data.folder import OWN
from refsam.data.listings import Part, read_videos
from refsam.data.photographs.check import check_folder
from refsam.errors import named

State = Literal["ok", "missing", "broken", "not there"]
Contents = tuple[str, list[str]]  # the counts in words, and every problem
# The name for a folder of photographs with class masks, which has no expressions and so no split of them.
PHOTOGRAPHS = "photographs"
# The largest number of wrong files that are named.
_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One row of the report: a part of a split, its state, what was found, and where to get it unless it is ok.

    "not there": an optional part that is absent.
    """

    dataset: str
    split: str
    part: str
    state: State
    detail: str
    source: str


def recognise(root: Path) -> tuple[str, ...]:
    """Names of the datasets whose files lie under `root`; raises DataError where there are none."""
    if not root.is_dir():
        raise DataError(f"root: no folder {root}")
    family = tuple(name for name in ("refcoco", "refcoco+", "refcocog") if (root / name).is_dir())
    if family:
        return family
    listings = sorted(root.glob("meta_expressions/*/meta_expressions.json"))
    if listings:
        videos = read_videos(listings[0])
        is_youtube = all(re.fullmatch("[0-9a-f]{10}", video) for video in videos)
        return ("ref-youtube-vos" if is_youtube else "ref-davis17",)
    if any(root.glob("*/meta_expressions.json")):
        return ("long-rvos" if any(root.glob("*/Annotations")) else "mevis",)
    if any(root.glob("*/expressions.csv")):
        return ("folder",)
    if (root / "manifest.jsonl").is_file():
        return (PHOTOGRAPHS,)
    raise DataError(
        f"root: no dataset is recognised in {root}; say which it should be with --dataset: {', '.join((*DATASETS, PHOTOGRAPHS))}"
    )


def check(
    name: str, root: Path, *, decode: bool = False, advance: Callable[[], None] = lambda: None
) -> Iterator[Finding]:
    """Look at every split of a dataset; with `decode` also into every image and mask.

    `advance` is called after every video.
    """
    if name == PHOTOGRAPHS:
        yield from _check_photographs(root, decode, advance)
        return
    if name not in DATASETS:
        raise DataError(f"dataset: got {name!r}, want one of {', '.join((*DATASETS, PHOTOGRAPHS))}")
    module = import_module(f"refsam.data.{DATASETS[name]}")
    official = getattr(module, "OFFICIAL_VIDEOS", {})
    whole: dict[str, Any] = {"exclude_shared": False} if DATASETS[name] == "refcoco" else {}
    for arguments in _variants(module, name, root):
        split = " ".join(arguments.values())
        parts: dict[str, Part] = module.parts(name, root, **arguments)
        missing = {kind for kind, part in parts.items() if part.needed and not part.path.exists()}
        found: dict[str, Contents] = {}
        if not missing:
            try:
                dataset = open_dataset(name, root, **arguments, **whole)
                found = _contents(dataset, decode, advance)
                _add_own(found, dataset, module)
            except DataError as error:
                found = _culprit(parts, str(error))
        for kind, part in parts.items():
            state, detail = _state(part, found.get(kind))
            if kind == "expressions" and state == "ok" and split in official:
                detail += f" (official: {official[split]} videos)"
            yield Finding(name, split, kind, state, detail, part.source)


def _variants(module: Any, name: str, root: Path) -> Iterable[dict[str, str]]:
    """The arguments that `open_dataset` takes for each split: the module's own, or its official splits."""
    if hasattr(module, "variants"):
        return module.variants(name, root)
    return ({"split": split} for split in module.OFFICIAL_VIDEOS)


def _check_photographs(root: Path, decode: bool, advance: Callable[[], None]) -> Iterator[Finding]:
    for split, reports in check_folder(root, decode, advance).items():
        for part, report in reports.items():
            counted = "; ".join([f"{report.count} {part}" if report.count else "", *report.notes])
            yield Finding(
                PHOTOGRAPHS, split, part, *_judged(counted.strip("; "), report.problems), OWN
            )


def _judged(counted: str, problems: list[str]) -> tuple[State, str]:
    """The state; the counts, the first few problems, and the number of all others."""
    detail = "; ".join(filter(None, [counted, named(problems, _NAMED, "; ")]))
    return "broken" if problems else "ok", detail


def _culprit(parts: dict[str, Part], error: str) -> dict[str, Contents]:
    """The error of opening a dataset, assigned to the part that the message names, else to the list of expressions."""
    named = [kind for kind, part in parts.items() if str(part.path) in error]
    return {(named or ["expressions"])[0]: ("", [error])}


def _add_own(found: dict[str, Contents], dataset: ReferringDataset, module: Any) -> None:
    """Add the problems that only the dataset's own module finds, and the faulty parts that it left out."""
    own = getattr(module, "problems", lambda dataset: ())
    try:
        extra = [("masks", fault) for fault in dataset.faults] + list(own(dataset))
    except UnreadableError as error:
        extra = [("masks", str(error))]
    for kind, problem in extra:
        if problem not in found[kind][1]:
            found[kind][1].append(problem)


def _state(part: Part, found: Contents | None) -> tuple[State, str]:
    if not part.path.exists():
        return ("missing" if part.needed else "not there"), str(part.path)
    return _judged(*(found or ("is there", [])))


def _contents(
    dataset: ReferringDataset, decode: bool, advance: Callable[[], None]
) -> dict[str, Contents]:
    """Counts and problems of each kind of part."""
    problems: dict[str, list[str]] = {"expressions": [], "frames": [], "masks": []}
    expressions = frames = masks = 0
    for video in dataset.videos:
        spoken = dataset.expressions(video.name)
        expressions += len(spoken)
        frames += len(video.frame_names)
        masks += len(video.annotated)
        names = ((f, dataset.frame_file(video.name, f)) for f in video.frame_names)
        absent = [f"no {video.name}/{frame}" for frame, path in names if not path.is_file()]
        problems["frames"] += absent
        if not spoken:
            problems["expressions"].append(f"{video.name} has none")
        if not video.frame_names:
            problems["frames"].append(f"{video.name} has none")
        problems["masks"] += dict.fromkeys(_missing_masks(dataset, video))
        if decode and not absent:
            for kind, problem in _undecodable(dataset, video):
                if problem not in problems[kind]:
                    problems[kind].append(problem)
        advance()
    counts = {
        "expressions": f"{len(dataset.videos)} videos, {expressions} expressions",
        "frames": f"{frames} frames",
        "masks": f"{masks} frames with masks",
    }
    counts["expressions"] = "; ".join([counts["expressions"], *dataset.notes])
    return {kind: (counted, problems[kind]) for kind, counted in counts.items()}


def _missing_masks(dataset: ReferringDataset, video: VideoRecord) -> Iterator[str]:
    if dataset.mask_source is None:
        return
    for expression in dataset.expressions(video.name):
        for frame in video.annotated:
            if not dataset.mask_source.has(expression, frame):
                yield f"no mask of {video.name}/{frame} for objects {expression.object_ids}"


def _undecodable(dataset: ReferringDataset, video: VideoRecord) -> Iterator[tuple[str, str]]:
    """(part, problem) of frames and masks that cannot be decoded, sizes that differ, and objects that no frame shows."""
    for frame in video.frame_names:
        try:
            dataset.frame(video.name, frame)
        except DataError as error:
            yield "frames", str(error)
    for expression in dataset.expressions(video.name):
        seen = not video.annotated or expression.object_ids == ()
        for frame in video.annotated:
            try:
                mask = dataset.mask(expression, frame)
                seen = seen or mask is None or bool(mask.any())
            except DataError as error:
                yield "masks", str(error)
        if not seen:
            yield "masks", f"no frame of {video.name} shows object {expression.object_ids}"
