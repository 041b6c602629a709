"""Reading the JSON files that list videos, frames and expressions."""

import codecs
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from refsam.data.dataset import DataError, Expression, MaskSource, ReferringDataset, VideoRecord
from refsam.errors import named

Item = TypeVar("Item")


@dataclass(frozen=True)
class FrameFolder:
    """Frames `<folder>/<video>/<frame><suffix>`."""

    folder: Path
    suffix: str = ".jpg"

    def __call__(self, video: str, frame: str) -> Path:
        """The file of a frame."""
        return self.folder / video / f"{frame}{self.suffix}"


@dataclass(frozen=True)
class Listed(Generic[Item]):
    """One item for each frame, by video and name of the frame: its file, or its position in a list."""

    items: Mapping[str, Mapping[str, Item]]

    def __call__(self, video: str, frame: str) -> Item:
        """The item of a frame."""
        return self.items[video][frame]


@dataclass(frozen=True)
class Part:
    """A file or folder of a split, and where to get it; `needed` ones are required to open the split."""

    path: Path
    source: str
    needed: bool = True


def check_split(name: str, split: str, splits: Collection[str]) -> None:
    """Raise DataError for a split that a dataset does not have."""
    if split not in splits:
        raise DataError(f"{name}: got split {split!r}, want one of {', '.join(splits)}")


def demand(name: str, path: Path, source: str) -> Path:
    """The path itself; if it does not exist, raises DataError, which says where to get it."""
    if not path.exists():
        raise DataError(f"{name}: no {path}; it comes from {source}")
    return path


def demand_parts(name: str, parts: Mapping[str, Part]) -> dict[str, Path]:
    """The paths of all parts; raises DataError if one that is needed is not there."""
    for part in parts.values():
        if part.needed:
            demand(name, part.path, part.source)
    return {kind: part.path for kind, part in parts.items()}


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises DataError."""
    try:
        return json.loads(path.read_bytes())  # bytes: UTF-8 with or without a mark, UTF-16
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def read_videos(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The entry `videos` of a `meta_expressions.json`; raises DataError for anything else."""
    content = read_json(path)
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, dict):
        raise DataError(f"{path}: no meta_expressions.json, want an object with the entry 'videos'")
    return videos


def records(
    path: Path,
    videos: Mapping[str, Mapping[str, Any]],
    names: Collection[str],
    annotated: bool,
    objects: str,
) -> tuple[tuple[VideoRecord, ...], dict[str, tuple[Expression, ...]]]:
    """Videos and expressions of the entries `names` of a `meta_expressions.json`, frames sorted, expressions in file order.

    `objects` is the key of the objects in an expression's entry. Raises DataError for an entry that does not follow the format.
    """
    found, by_video = [], {}
    for name in names:
        try:
            frames = tuple(sorted(videos[name]["frames"]))
            by_video[name] = tuple(
                Expression(name, number, " ".join(entry["exp"].split()), _numbers(entry, objects))
                for number, entry in videos[name]["expressions"].items()
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"the entry of {name} is not in the format: {error!r}"
            raise DataError(f"{path}: {problem}") from error
        found.append(VideoRecord(name, frames, frames if annotated else ()))
    every = [expression for rows in by_video.values() for expression in rows]
    untold = [f"{e.video}/{e.expression_id}" for e in every if e.object_ids is None]
    if annotated and 0 < len(untold) < len(every):
        count = f"{len(untold)} of {len(every)}"
        raise DataError(f"{path}: {count} expressions name no objects: {named(untold)}")
    return tuple(found), by_video


def open_listed(
    name: str,
    split: str,
    root: Path,
    places: Mapping[str, Path],
    masks: MaskSource | None,
    objects: str,
    *,
    names: Collection[str] | None = None,
    notes: tuple[str, ...] = (),
) -> ReferringDataset:
    """A split from its `places`: the list of expressions, the folder of frames and that of masks; all videos or `names`.

    Without `masks` it has no truth. Raises DataError as `records` does.
    """
    listed = read_videos(places["expressions"])
    chosen = list(listed) if names is None else names
    found = records(places["expressions"], listed, chosen, masks is not None, objects)
    return ReferringDataset(
        name,
        split,
        root,
        *found,
        FrameFolder(places["frames"]),
        masks,
        truth=None if masks is None else places["masks"],
        listing=places["expressions"],
        notes=notes,
    )


def _numbers(entry: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """The objects in an expression's entry, one number or several; None if it names none."""
    if key not in entry:
        return None
    numbers = entry[key]
    return tuple(int(n) for n in (numbers if isinstance(numbers, list) else [numbers]))


def read_text(path: Path, *encodings: str) -> str:
    """A text file in UTF-16 if it begins with that byte order mark, else in UTF-8, else in the first encoding that fits.

    Raises DataError where none of them fits.
    """
    content = path.read_bytes()
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    tried = ("utf-16",) if is_wide else ("utf-8-sig", *encodings)
    for encoding in tried:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path}: cannot be read as text of {' or '.join(tried)}")
