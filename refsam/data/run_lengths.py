"""Masks as COCO's run lengths, in tables that open quickly and that processes share."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refsam.data.dataset import DataError, Expression, Mask
from refsam.data.new_folder import staged_folder
from refsam.runtime.files import only_writer

Arrays = dict[str, NDArray[Any]]
Size = tuple[int, int]  # height, width
_LOG = logging.getLogger(__name__)
# Changes with the contents of the tables, so that those of earlier versions are built again.
_FORMAT = 2
_CORNERS = 3


class Code(NamedTuple):
    """COCO's compressed run lengths of one mask, and its size."""

    counts: bytes
    size: Size


@dataclass(frozen=True)
class RunLengthTable:
    """The masks of objects, each in one frame (of an image) or several (of a video).

    Object `ids[i]` has the codes `starts[i]` to `starts[i + 1]`, one per frame of its video; code j is the bytes
    `offsets[j]` to `offsets[j + 1]` of `codes`, none of them where the object is not seen, and its mask has the size `sizes[i]`.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    codes: NDArray[np.uint8]
    sizes: NDArray[np.int64]

    @staticmethod
    def of_tracks(tracks: Mapping[int, Sequence[Code | None]]) -> "RunLengthTable":
        """The table of each object's codes."""
        order = sorted(tracks)
        codes = [b"" if code is None else code.counts for n in order for code in tracks[n]]
        sizes = [
            next((c.size for c in reversed(tracks[n]) if c is not None), (0, 0)) for n in order
        ]
        return RunLengthTable(
            np.array(order, np.int64),
            np.cumsum([0, *(len(tracks[n]) for n in order)]),
            np.cumsum([0, *map(len, codes)]),
            np.frombuffer(b"".join(codes), np.uint8),
            np.array(sizes, np.int64).reshape(-1, 2),
        )

    def code(self, number: int, position: int) -> Code | None:
        """The code of an object in the frame at a position, None where it is not seen.

        Raises DataError for an object or a frame that the table does not have.
        """
        row = self.row(number)
        if row is None or not 0 <= position < self.starts[row + 1] - self.starts[row]:
            raise DataError(f"the table of masks has no object {number} in frame {position}")
        index = self.starts[row] + position
        counts = self.codes[self.offsets[index] : self.offsets[index + 1]].tobytes()
        height, width = self.sizes[row]
        return Code(counts, (int(height), int(width))) if counts else None

    def sizes_of(self, numbers: Iterable[int]) -> list[Size]:
        """The sizes of some objects' masks, without those that the table lacks."""
        rows = (self.row(number) for number in numbers)
        return [(int(self.sizes[r][0]), int(self.sizes[r][1])) for r in rows if r is not None]

    def row(self, number: int) -> int | None:
        """Index of an object in `ids`."""
        row = int(np.searchsorted(self.ids, number))
        return row if row < len(self.ids) and self.ids[row] == number else None


@dataclass(frozen=True)
class RunLengthMasks:
    """Masks of a run-length table; `position(video, frame)` is the frame's place in the order of the codes."""

    table: RunLengthTable
    position: Callable[[str, str], int]

    def __call__(self, expression: Expression, frame: str, size: Size) -> Mask | None:
        """The union of the expression's objects; empty if there are none, None if the dataset does not give them.

        Codes of another size than the frame are scaled to it if the aspect is the same; raises DataError if it is not.
        """
        if expression.object_ids is None:
            return None
        position = self.position(expression.video, frame)
        mask = np.zeros(size, bool)
        for number in expression.object_ids:
            try:
                code = self.table.code(number, position)
                if code is not None:
                    mask |= scaled(decode(code), size)
            except DataError as error:
                raise DataError(f"{expression.video}/{frame}, object {number}: {error}") from error
        return mask

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether all of the expression's objects are in the table."""
        return all(self.table.row(number) is not None for number in expression.object_ids or ())


def open_arrays(path: Path, build: Callable[[], Arrays]) -> Arrays:
    """Cache on the disk the arrays that `build` makes of a file: one process makes them, all share them.

    The cache is a hidden folder named after the file's size and age: beside the file or, where that cannot be written, in the
    user's cache (XDG_CACHE_HOME). If neither can be written, the arrays are built each time.
    """
    facts = path.stat()
    hidden = f".{path.stem}.{facts.st_size}.{facts.st_mtime_ns}.v{_FORMAT}"
    unique = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refsam" / unique
    places = (path.with_name(hidden), cache / hidden)
    for place in places:
        if place.is_dir():
            return _load(place)
    for place in places:
        if _can_write(place.parent):
            with only_writer(place, wait=True):
                if not place.is_dir():  # another process was quicker
                    _LOG.info("reading %s once; later it opens from %s", path, place)
                    arrays = build()
                    with staged_folder(place) as folder:
                        for name, array in arrays.items():
                            np.save(folder / f"{name}.npy", array)
            return _load(place)
    return build()


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _load(folder: Path) -> Arrays:
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def encode(segmentation: Any, size: Size) -> Code | None:
    """The code of a COCO segmentation: polygons on an image of `size`, whose union is the object, or run lengths.

    Polygons with fewer than three corners cover nothing and are left out; None where nothing is left or the format is wrong.
    """
    api = coco_masks()
    try:
        if isinstance(segmentation, Mapping):
            return compressed(segmentation)
        polygons = [np.asarray(polygon, np.float64).tolist() for polygon in segmentation]
        usable = [p for p in polygons if len(p) >= 2 * _CORNERS and np.isfinite(p).all()]
        if not usable or any(len(polygon) % 2 for polygon in usable):
            return None
        # Parts may overlap: the union, never the sum.
        return Code(api.merge(api.frPyObjects(usable, *size))["counts"], size)
    except (TypeError, ValueError, OverflowError, KeyError):
        return None


def compressed(code: Mapping[str, Any]) -> Code:
    """COCO's run lengths, compressed or as a list; raises KeyError, TypeError or ValueError for anything else."""
    height, width = code["size"]
    counts = code["counts"]
    if isinstance(counts, list):
        counts = coco_masks().frPyObjects(dict(code), height, width)["counts"]
    return Code(
        counts.encode("ascii") if isinstance(counts, str) else bytes(counts), (height, width)
    )


def decode(code: Code) -> Mask:
    """The mask (H, W) of a code; raises DataError where its runs do not add up to its size, which pycocotools does not notice."""
    height, width = code.size
    total = _total(code.counts)
    if total != height * width:
        raise DataError(
            f"its run lengths cover {total} pixels, want {height * width} of {width}x{height}"
        )
    return np.asarray(coco_masks().decode({"size": code.size, "counts": code.counts})).astype(bool)


def _total(counts: bytes) -> int:
    """Number of pixels that compressed run lengths cover, -1 for invalid ones.

    Each number has 5 bits per character, the lowest first. Bit 5 is set in all but the last character, whose bit 4 is the sign.
    From the fourth on, a number is the difference from the one two before it.
    """
    characters = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((characters & 32) == 0)
    if len(ends) == 0 or ends[-1] != len(characters) - 1:
        return -1
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if lengths.max() > 12:
        return -1
    places = np.arange(len(characters)) - np.repeat(begins, lengths)
    values = np.add.reduceat((characters & 31) << (5 * places), begins)
    values -= np.where(characters[ends] & 16, np.int64(1) << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return int(values.sum()) if values.min() >= 0 else -1


def scaled(mask: Mask, size: Size) -> Mask:
    """The mask in another size of the same aspect, by its nearest pixels; raises DataError for another aspect."""
    if mask.shape == size:
        return mask
    if not same_aspect((mask.shape[0], mask.shape[1]), size):
        raise DataError(
            f"its mask is of an image of {mask.shape[1]}x{mask.shape[0]}, its file has {size[1]}x{size[0]} (width x height)"
        )
    image = Image.fromarray(mask.view(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
    return np.asarray(image) != 0


def same_aspect(first: Size, second: Size) -> bool:
    """Whether one size is the other scaled, to the pixel."""
    ratios = [b / a for a, b in zip(first, second, strict=True) if a]
    if len(ratios) < 2:
        return False
    by_height = abs(first[1] * ratios[0] - second[1]) <= 1
    return by_height or abs(first[0] * ratios[1] - second[0]) <= 1


def coco_masks() -> Any:
    """pycocotools' masks; raises DataError where the package is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "pycocotools is not installed, which COCO's masks need: pip install 'refsam[train]'"
        ) from error
    return mask
