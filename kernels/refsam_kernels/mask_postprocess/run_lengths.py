"""COCO's compressed run lengths, from where the runs of a mask end.

The format is that of cocoapi's `rleToString` (common/maskApi.c): from the fourth run on, the difference to the last run of
the same value; five bits per character, the lowest first, a sixth bit where more follow, and 48 added.
"""

import ctypes
from typing import TypedDict

import torch
from torch import Tensor

# Characters that a difference of two numbers of 31 bits can take.
CHARACTERS = 7


class RunLengths(TypedDict):
    """A mask as pycocotools writes it: [height, width], and run lengths in column-major order, zeros first."""

    size: list[int]
    counts: bytes


def encode(ends: Tensor, size: tuple[int, int]) -> RunLengths:
    """Ends of the runs but the last (n,) integer, ascending, on the CPU -> the mask's run lengths."""
    height, width = size
    bounds = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([height * width])])
    return {"size": [height, width], "counts": compress(bounds.long().diff())}


def compress(lengths: Tensor) -> bytes:
    """Run lengths (n,) int64 as characters."""
    values = lengths.clone()
    values[3:] -= lengths[1:-2]
    groups = values.unsqueeze(1) >> torch.arange(0, 5 * CHARACTERS, 5)
    characters = groups & 31
    # Once the number has ended, the bits after a group's last one repeat it: the sign.
    more = (groups >> 5) != -(characters >> 4)
    characters += 48 + 32 * more
    begun = torch.ones_like(more)
    begun[:, 1:] = more[:, :-1]
    text = characters[begun].to(torch.uint8)
    return ctypes.string_at(text.data_ptr(), text.numel())
