"""The memory layout of packed masks, and the statistics of each mask.

Masks are concatenated in one list of words. Every column of a mask (H, W) has ceil(H / 32) words; bit k of word j, the
lowest being k = 0, is the pixel of row 32 j + k; bits below the last row are 0. So the words give the pixels in the order of
COCO's run lengths, column by column.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WORD = 32
# Columns of the statistics: pixels above the threshold, above threshold + offset and above threshold - offset; the box, whose
# right and bottom lie outside it (all 0 for an empty mask); pixels that are NaN, which no threshold is below.
STATISTICS = ("area", "certain", "possible", "left", "top", "right", "bottom", "nan")


def pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width, height, width, ...) as pairs."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def words_of(height: int, width: int) -> int:
    """Number of words of a mask."""
    return width * -(-height // WORD)


def unpack(words: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Packed masks as (H, W) bool each, views of column-major memory."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    counts = [words_of(*size) for size in sizes]
    for part, (height, width) in zip(words.split(counts), sizes, strict=True):
        columns = (part.view(width, -1, 1) >> shifts & 1).bool().flatten(1)
        yield columns[:, :height].T
