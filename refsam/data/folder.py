"""Your own videos: folders of frames and masks, and a table of expressions."""

import csv
import io
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

from refsam.data.dataset import DataError, Expression, ReferringDataset, VideoRecord
from refsam.data.listings import Listed, Part, demand_parts, read_text
from refsam.data.masks import NumberedMasks, read_numbers
from refsam.errors import named
from refsam.images import images_in

_COLUMNS = ("video", "objects", "text")
_DELIMITERS = ",;\t"  # Excel's, by language and format
OWN = "you: docs/data.md says how"
_WHITE = 255


def variants(name: str, root: Path) -> tuple[dict[str, str], ...]:
    """The arguments that `open_dataset` takes for each split: every folder below `root` that holds a table of expressions."""
    return tuple({"split": path.parent.name} for path in sorted(root.glob("*/expressions.csv")))


def parts(name: str, root: Path, split: str) -> dict[str, Part]:
    """The files of a split."""
    return {
        "expressions": Part(root / split / "expressions.csv", OWN),
        "frames": Part(root / split / "frames", OWN),
        "masks": Part(root / split / "masks", OWN, needed=False),
    }


def open_split(name: str, root: Path, split: str) -> ReferringDataset:
    """One split: `frames/<video>/`, `masks/<video>/` with a PNG of the same stem for a frame, and `expressions.csv`.

    Frames are in natural order; those without a mask are used in evaluation but not in training. Raises DataError where
    there are masks but none of them belongs to a frame.
    """
    places = demand_parts(name, parts(name, root, split))
    by_video = _read_table(places["expressions"])
    frames = {video: _frames(places["frames"], video) for video in by_video}
    masks = {video: _masks(places["masks"] / video) for video in by_video}
    videos = tuple(
        VideoRecord(video, tuple(names), tuple(frame for frame in names if frame in masks[video]))
        for video, names in frames.items()
    )
    has_masks = places["masks"].is_dir()
    faults = tuple(_mismatches(places, frames, masks)) if has_masks else ()
    if has_masks and not any(video.annotated for video in videos):
        reasons = "; ".join(faults) or f"{places['masks']} holds none"
        raise DataError(f"folder: no frame has a mask: {reasons}")
    return ReferringDataset(
        name,
        split,
        root,
        videos,
        by_video,
        Listed(frames),
        NumberedMasks(Listed(masks)) if has_masks else None,
        truth=places["masks"] if has_masks else None,
        faults=faults,
        notes=tuple(_unlisted(places["frames"], by_video)),
    )


def problems(dataset: ReferringDataset) -> Iterable[tuple[str, str]]:
    """(part, problem) of objects that no mask of their video shows; masks are decoded until each object has been seen."""
    if not isinstance(dataset.mask_source, NumberedMasks):
        return
    for video in dataset.videos:
        wanted = {n for e in dataset.expressions(video.name) for n in e.object_ids or ()}
        seen: set[int] = set()
        for frame in video.annotated:
            if wanted <= seen:
                break
            seen |= set(read_numbers(dataset.mask_source.file(video.name, frame)).ravel().tolist())
        if video.annotated and (unseen := sorted(wanted - seen)):
            yield "masks", _not_shown(video.name, unseen, seen - {0})


def _not_shown(video: str, unseen: list[int], seen: set[int]) -> str:
    numbers = ", ".join(map(str, unseen))
    text = f"no mask of {video} shows object {numbers}: they hold {', '.join(map(str, sorted(seen))) or 'the background only'}"
    if seen == {_WHITE}:
        text += f"; save them as 0 and {unseen[0]}, or write {_WHITE} into the column objects"
    return text


def _read_table(path: Path) -> dict[str, tuple[Expression, ...]]:
    """Expressions by video, numbered from 0 within each."""
    text = read_text(path, "cp1252")
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    found: dict[str, list[Expression]] = {}
    table = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    try:
        columns = tuple(name.strip() for name in next(table, ()))
        if columns != _COLUMNS:
            got = ", ".join(columns)
            raise DataError(f"{path}: got the columns {got}, want {', '.join(_COLUMNS)}")
        for row in table:
            if any(cell.strip() for cell in row):
                expression = _expression(row, f"{path}, line {table.line_num}", found)
                found.setdefault(expression.video, []).append(expression)
    except csv.Error as error:
        raise DataError(f"{path}, line {table.line_num}: {error}") from error
    if not found:
        raise DataError(f"{path}: no expression in it")
    return {video: tuple(expressions) for video, expressions in found.items()}


def _expression(row: list[str], place: str, found: Mapping[str, list[Expression]]) -> Expression:
    if len(row) != len(_COLUMNS):
        wanted = 'VIDEO,"1 2",EXPRESSION (quoted if it has commas)'
        raise DataError(f"{place}: got {len(row)} columns, want {wanted}")
    video, numbers, text = (cell.strip() for cell in row)
    try:
        objects = tuple(int(number) for number in numbers.split())
    except ValueError as error:
        raise DataError(f'{place}: {error}; want VIDEO,"1 2",EXPRESSION') from error
    if not video or not text:
        raise DataError(f"{place}: want a video, numbers of objects and an expression")
    if video in (".", "..") or "/" in video or "\\" in video:
        raise DataError(f"{place}: got the video {video!r}, want the name of a folder below frames")
    return Expression(video, str(len(found.get(video, ()))), " ".join(text.split()), objects)


def _frames(folder: Path, video: str) -> dict[str, Path]:
    """Frames by name, in order; raises DataError where there are none or two of one name."""
    place = folder / video
    if not place.is_dir():
        raise DataError(f"folder: no frames {place}{_nearest(video, _folders(folder))}")
    paths = images_in(place)
    files = {path.stem: path for path in paths}
    if not files or len(files) < len(paths):
        count = f"{len(paths)} frames of {len(files)} names"
        raise DataError(f"{place}: {count}, want one or more, each once")
    return files


def _masks(folder: Path) -> dict[str, Path]:
    """Masks by the frame's name."""
    if not folder.is_dir():
        return {}
    return {path.stem: path for path in images_in(folder) if path.suffix.lower() == ".png"}


def _mismatches(
    places: Mapping[str, Path],
    frames: Mapping[str, Mapping[str, Path]],
    masks: Mapping[str, Mapping[str, Path]],
) -> Iterable[str]:
    """Problems of the masks' folders and names, each with the most likely correction."""
    folder = places["masks"]
    unlisted = [name for name in _folders(folder) if name not in frames]
    for name in unlisted:
        yield f"{folder / name} is of no video in {places['expressions'].name}{_nearest(name, list(frames))}"
    for video, names in frames.items():
        strange = [name for name in masks[video] if name not in names]
        if strange:
            yield (
                f"{folder / video}: {len(strange)} masks of no frame, such as {strange[0]}.png; want the frames' names, "
                f"such as {_alike(strange[0], list(names))}.png"
            )
        elif not masks[video] and (folder / video).is_dir():
            others = sorted({path.suffix for path in (folder / video).iterdir()})
            yield f"{folder / video}: no PNG in it, but {', '.join(others) or 'nothing'}"
        elif not masks[video]:
            yield f"{video} has no masks{_nearest(video, unlisted)}: want {folder / video}"


def _unlisted(folder: Path, by_video: Mapping[str, object]) -> Iterable[str]:
    names = [name for name in _folders(folder) if name not in by_video]
    if names:
        yield f"videos in {folder} without expressions: {named(names)}"


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _nearest(name: str, names: list[str]) -> str:
    """The question whether a similar name is meant; an empty string if there is none."""
    near = get_close_matches(name, names, 1)
    return f" (is it {near[0]}?)" if near else ""


def _alike(name: str, names: list[str]) -> str:
    """The name that is most similar, or the first one."""
    within = [each for each in names if each in name]
    return (within or get_close_matches(name, names, 1, 0.0) or names)[0]
