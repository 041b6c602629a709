"""MeViS: expressions about the motion of several objects, with masks as run lengths in one large JSON file."""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refsam.data.dataset import DataError, Expression, Mask, ReferringDataset
from refsam.data.listings import (
    FrameFolder,
    Part,
    check_split,
    demand_parts,
    read_json,
    read_videos,
    records,
)
from refsam.data.masks import coco_masks

SPLITS = ("train", "valid_u", "valid", "test")
_SITE = "https://github.com/henghuiding/MeViS"
OFFICIAL_VIDEOS = {"train": 1662, "valid_u": 50, "valid": 140, "test": 154}
_LOG = logging.getLogger(__name__)


def variants(name: str, root: Path) -> tuple[dict[str, str], ...]:
    """The arguments that `open_dataset` takes for each split."""
    return tuple({"split": split} for split in SPLITS)


def parts(name: str, root: Path, split: str) -> dict[str, Part]:
    """What a split is made of; the truth of valid and test is not public."""
    public = split in ("train", "valid_u")
    return {
        "expressions": Part(root / split / "meta_expressions.json", _SITE),
        "frames": Part(root / split / "JPEGImages", _SITE),
        "masks": Part(
            root / split / "mask_dict.json", _SITE if public else "nowhere: not public", public
        ),
    }


def open_split(name: str, root: Path, split: str) -> ReferringDataset:
    """One split. An expression's `object_ids` are its `anno_id`s, any number of them, none in sentences about nothing."""
    check_split(name, split, SPLITS)
    places = demand_parts(name, parts(name, root, split))
    listed = read_videos(places["expressions"])
    has_truth = places["masks"].is_file()
    videos, sentences = records(places["expressions"], listed, list(listed), has_truth, _objects)
    source = None
    notes: tuple[str, ...] = (f"{split}: no truth in {places['masks']}; see {_SITE}",)
    if has_truth:
        positions = {
            video: {frame: index for index, frame in enumerate(entry["frames"])}
            for video, entry in listed.items()
        }
        source, notes = RunLengthMasks(RunLengthTable.of_file(places["masks"]), positions), ()
    return ReferringDataset(
        name,
        split,
        root,
        videos,
        sentences,
        FrameFolder(places["frames"]),
        source,
        truth=places["masks"] if has_truth else None,
        listing=places["expressions"],
        notes=notes,
    )


def _objects(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    return tuple(int(number) for number in entry["anno_id"]) if "anno_id" in entry else None


@dataclass(frozen=True)
class RunLengthTable:
    """`mask_dict.json` as arrays, which processes can share and which open at once.

    Object `ids[i]` has the codes `starts[i]` to `starts[i + 1]`, one per frame of its video; code j is the bytes
    `offsets[j]` to `offsets[j + 1]` of `codes`, none of them where the object is not seen, and its mask has the size `sizes[i]`.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    codes: NDArray[np.uint8]
    sizes: NDArray[np.int64]

    @staticmethod
    def of_file(path: Path) -> "RunLengthTable":
        """The table of a `mask_dict.json`, kept beside it in a folder named after its size and age where that can be written."""
        facts = path.stat()
        folder = path.with_name(f".{path.stem}.{facts.st_size}.{facts.st_mtime_ns}")
        names = RunLengthTable.__dataclass_fields__
        if not folder.is_dir():
            _LOG.info("reading %s once; later it opens from %s", path, folder)
            table = RunLengthTable.of_tracks(path, read_json(path))
            try:
                table._write(folder)
            except OSError:  # a read-only disk: every process reads the JSON again
                return table
        return RunLengthTable(
            **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        )

    @staticmethod
    def of_tracks(path: Path, tracks: Mapping[str, Sequence[Any]]) -> "RunLengthTable":
        """The table of the content of a `mask_dict.json`; raises DataError where that is in no such format."""
        order = sorted(tracks, key=int)
        starts, offsets, codes, sizes = [0], [0], bytearray(), []
        for number in order:
            size = (0, 0)
            for code in tracks[number]:
                if code is not None:
                    try:
                        size = tuple(code["size"])
                        codes += _compressed(code)
                    except (KeyError, TypeError, ValueError) as error:
                        raise DataError(f"{path}: object {number}: {error!r}") from error
                offsets.append(len(codes))
            starts.append(len(offsets) - 1)
            sizes.append(size)
        return RunLengthTable(
            np.array([int(number) for number in order], np.int64),
            np.array(starts, np.int64),
            np.array(offsets, np.int64),
            np.frombuffer(bytes(codes), np.uint8),
            np.array(sizes, np.int64).reshape(-1, 2),
        )

    def code(self, number: int, position: int) -> tuple[bytes, tuple[int, int]] | None:
        """Run lengths and (height, width) of an object in the frame at a position, None where it is not seen.

        Raises DataError for an object or a frame that the table does not have.
        """
        row = self.row(number)
        if row is None or not 0 <= position < self.starts[row + 1] - self.starts[row]:
            raise DataError(f"mevis: mask_dict.json has no object {number} in frame {position}")
        index = self.starts[row] + position
        code = self.codes[self.offsets[index] : self.offsets[index + 1]].tobytes()
        height, width = self.sizes[row]
        return (code, (int(height), int(width))) if code else None

    def row(self, number: int) -> int | None:
        """Where an object stands in `ids`."""
        row = int(np.searchsorted(self.ids, number))
        return row if row < len(self.ids) and self.ids[row] == number else None

    def _write(self, folder: Path) -> None:
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
        for name in self.__dataclass_fields__:
            np.save(partial / f"{name}.npy", getattr(self, name))
        try:
            os.rename(partial, folder)
        except OSError:  # another process was quicker
            if not folder.is_dir():
                raise


def _compressed(code: Mapping[str, Any]) -> bytes:
    counts = code["counts"]
    if isinstance(counts, list):
        counts = coco_masks().frPyObjects(dict(code), *code["size"])["counts"]
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)


@dataclass(frozen=True)
class RunLengthMasks:
    """Masks of a run-length table; `positions` of the frames by video: the codes are listed in that order, not by name."""

    table: RunLengthTable
    positions: Mapping[str, Mapping[str, int]]

    def __call__(self, expression: Expression, frame: str, size: tuple[int, int]) -> Mask | None:
        """The union of the expression's objects; nothing where there are none. None if the dataset does not tell them."""
        if expression.object_ids is None:
            return None
        position = self.positions[expression.video][frame]
        found = [self.table.code(number, position) for number in expression.object_ids]
        codes = [
            {"size": list(size), "counts": code} for code, size in (item for item in found if item)
        ]
        if not codes:
            return np.zeros(size, bool)
        return np.asarray(coco_masks().decode(codes).any(axis=2))

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether all of the expression's objects are in the table."""
        return all(self.table.row(number) is not None for number in expression.object_ids or ())
