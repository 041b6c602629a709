"""Where true masks come from: maps of object numbers, binary images, COCO's polygons and run lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refsam.data.dataset import (
    IMAGE_ERRORS,
    DataError,
    Expression,
    Mask,
    UnreadableError,
)


@dataclass(frozen=True)
class NumberedMasks:
    """PNGs `<folder>/<video>/<frame>.png` whose pixels are object numbers, 0 the background (YouTube-VOS, DAVIS)."""

    folder: Path

    def __call__(self, expression: Expression, frame: str, size: tuple[int, int]) -> Mask | None:
        """Where a pixel's number is one of the expression's; None if the dataset does not tell these."""
        if expression.object_ids is None:
            return None
        numbers = read_numbers(self._file(expression, frame))
        mask = np.zeros(numbers.shape, bool)
        for number in expression.object_ids:
            mask |= numbers == number
        return mask

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether the file is there."""
        return self._file(expression, frame).is_file()

    def _file(self, expression: Expression, frame: str) -> Path:
        return self.folder / expression.video / f"{frame}.png"


@dataclass(frozen=True)
class BinaryMasks:
    """PNGs `<folder>/<video>/<expression_id>/<frame>.png`, not 0 where the object is."""

    folder: Path

    def __call__(self, expression: Expression, frame: str, size: tuple[int, int]) -> Mask | None:
        """Where the image is not 0."""
        return read_numbers(self._file(expression, frame)) != 0

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether the file is there."""
        return self._file(expression, frame).is_file()

    def _file(self, expression: Expression, frame: str) -> Path:
        return self.folder / expression.video / expression.expression_id / f"{frame}.png"


@dataclass(frozen=True)
class PolygonMasks:
    """COCO segmentations by object number: lists of polygons, whose union is the object, or one run-length code."""

    segmentations: Mapping[int, Any]

    def __call__(self, expression: Expression, frame: str, size: tuple[int, int]) -> Mask | None:
        """The union of the expression's objects."""
        mask = np.zeros(size, bool)
        for number in expression.object_ids or ():
            mask |= decode_segmentation(self.segmentations[number], size)
        return mask

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether all of the expression's objects are there."""
        return all(number in self.segmentations for number in expression.object_ids or ())


@lru_cache(maxsize=16)  # several expressions of one video are asked for together
def read_numbers(path: Path) -> NDArray[np.uint8]:
    """The pixel values (H, W) uint8 of a palette, grey or one-bit PNG, not to be written to.

    Raises UnreadableError for what cannot be decoded, DataError for a colour image.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise DataError(
                    f"{path}: an image of mode {image.mode}, want a palette or grey one of object numbers"
                )
            numbers = np.asarray(image).astype(np.uint8)
    except DataError:
        raise
    except IMAGE_ERRORS as error:
        raise UnreadableError(f"{path}: cannot be read as a mask: {error}") from error
    numbers.setflags(write=False)
    return numbers


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> Mask:
    """COCO's polygons or run-length code, compressed or not, as a mask (H, W) bool of `size` (height, width)."""
    api = coco_masks()
    if isinstance(segmentation, Sequence):
        codes = api.frPyObjects(segmentation, *size)
        # Parts may overlap: the union, never the sum.
        return np.asarray(api.decode(codes).any(axis=2))
    if not isinstance(segmentation["counts"], str | bytes):
        segmentation = api.frPyObjects(segmentation, *segmentation["size"])
    return np.asarray(api.decode(segmentation)).astype(bool)


class _CocoMasks(Protocol):
    def frPyObjects(self, objects: Any, height: int, width: int) -> Any: ...

    def decode(self, codes: Any) -> NDArray[np.uint8]: ...


def coco_masks() -> _CocoMasks:
    """pycocotools' masks; raises DataError where the package is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "pycocotools is not installed, which COCO's masks need: pip install 'refsam[train]'"
        ) from error
    api: _CocoMasks = mask
    return api
