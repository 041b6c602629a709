"""Your own videos: folders of frames and masks, and a table of sentences."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refsam.data.dataset import DataError, Expression, ReferringDataset, VideoRecord
from refsam.data.listings import Part, demand_parts
from refsam.data.masks import NumberedMasks

_FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
_COLUMNS = ("video", "objects", "text")
_OWN = "you: docs/data.md says how"


@dataclass(frozen=True)
class ListedFrames:
    """Files of frames by video and frame, which may be JPEG or PNG."""

    files: Mapping[str, Mapping[str, Path]]

    def __call__(self, video: str, frame: str) -> Path:
        """The file of a frame."""
        return self.files[video][frame]


def variants(name: str, root: Path) -> tuple[dict[str, str], ...]:
    """The arguments that `open_dataset` takes for each split: every folder below `root` that holds a table of sentences."""
    return tuple({"split": path.parent.name} for path in sorted(root.glob("*/expressions.csv")))


def parts(name: str, root: Path, split: str) -> dict[str, Part]:
    """What a split is made of."""
    return {
        "expressions": Part(root / split / "expressions.csv", _OWN),
        "frames": Part(root / split / "frames", _OWN),
        "masks": Part(root / split / "masks", _OWN, needed=False),
    }


def open_split(name: str, root: Path, split: str) -> ReferringDataset:
    """One split: `frames/<video>/<frame>.jpg` or `.png`, `masks/<video>/<frame>.png`, and `expressions.csv`.

    Frames without a mask are seen by evaluation and left out of training.
    """
    places = demand_parts(name, parts(name, root, split))
    sentences = _read_table(places["expressions"])
    files = {video: _frames(places["frames"] / video) for video in sentences}
    masks = places["masks"]
    videos = tuple(
        VideoRecord(
            video,
            tuple(names),
            tuple(frame for frame in names if (masks / video / f"{frame}.png").is_file()),
        )
        for video, names in files.items()
    )
    return ReferringDataset(
        name,
        split,
        root,
        videos,
        sentences,
        ListedFrames(files),
        NumberedMasks(masks) if masks.is_dir() else None,
        truth=masks if masks.is_dir() else None,
    )


def _read_table(path: Path) -> dict[str, tuple[Expression, ...]]:
    """Expressions by video, numbered from 0 within each."""
    found: dict[str, list[Expression]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, skipinitialspace=True)
        if tuple(table.fieldnames or ()) != _COLUMNS:
            raise DataError(
                f"{path}: got the columns {table.fieldnames}, want {', '.join(_COLUMNS)}"
            )
        for row in table:
            try:
                objects = tuple(int(number) for number in row["objects"].split())
                video, text = row["video"].strip(), row["text"].strip()
            except (AttributeError, ValueError) as error:
                raise DataError(
                    f'{path}, line {table.line_num}: {error}; want VIDEO,"1 2",SENTENCE'
                ) from error
            if not video or not text or None in row:
                raise DataError(
                    f"{path}, line {table.line_num}: want a video, numbers of objects and a sentence (quoted if it has commas)"
                )
            expressions = found.setdefault(video, [])
            expressions.append(Expression(video, str(len(expressions)), text, objects))
    return {video: tuple(expressions) for video, expressions in found.items()}


def _frames(folder: Path) -> dict[str, Path]:
    """Frames by name, in order; raises DataError where there are none or two of one name."""
    if not folder.is_dir():
        raise DataError(f"folder: no frames {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _FRAME_SUFFIXES)
    files = {path.stem: path for path in paths}
    if not files or len(files) < len(paths):
        raise DataError(
            f"{folder}: {len(paths)} frames of {len(files)} names, want one or more, each once"
        )
    return files
