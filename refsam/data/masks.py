"""Readers of true masks: maps of object numbers and binary images; for run lengths see `refsam.data.run_lengths`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refsam.data.dataset import DataError, Expression, Mask, UnreadableError
from refsam.images import IMAGE_ERRORS


@dataclass(frozen=True)
class NumberedMasks:
    """Images, found by video and frame, whose pixels are object numbers, 0 the background (YouTube-VOS, DAVIS)."""

    file: Callable[[str, str], Path]

    def __call__(self, expression: Expression, frame: str, size: tuple[int, int]) -> Mask | None:
        """Pixels whose number is one of the expression's; None if the dataset does not give them."""
        if expression.object_ids is None:
            return None
        is_meant = np.zeros(256, bool)
        is_meant[[number for number in expression.object_ids if 0 <= number < 256]] = True
        return is_meant[read_numbers(self.file(expression.video, frame))]

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether the file is there."""
        return self.file(expression.video, frame).is_file()


@dataclass(frozen=True)
class BinaryMasks:
    """PNGs `<folder>/<video>/<expression_id>/<frame>.png`, not 0 where the object is."""

    folder: Path

    def __call__(self, expression: Expression, frame: str, size: tuple[int, int]) -> Mask | None:
        """Pixels of the image that are not 0."""
        return read_numbers(self._file(expression, frame)) != 0

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether the file is there."""
        return self._file(expression, frame).is_file()

    def _file(self, expression: Expression, frame: str) -> Path:
        return self.folder / expression.video / expression.expression_id / f"{frame}.png"


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
