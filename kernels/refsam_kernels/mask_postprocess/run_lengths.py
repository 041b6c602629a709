"""COCO's compressed run lengths, from where the runs of a mask end.

The format is that of cocoapi's `rleToString` (common/maskApi.c): from the fourth run on, the difference to the last run of
the same value; five bits per character, the lowest first, a sixth bit where more follow, and 48 added.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from refsam_kernels.core import libraries

# Characters that a difference of two numbers of 31 bits can take.
CHARACTERS = 7


class RunLengths(TypedDict):
    """A mask as pycocotools writes it: [height, width], and run lengths in column-major order, zeros first."""

    size: list[int]
    counts: bytes


def encode(ends: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[RunLengths]:
    """Ends of the runs but the last of every mask (n,) int32, ascending, on the CPU -> the masks' run lengths."""
    try:
        library = libraries.load("cpu")
    except (ImportError, OSError):
        texts = [compress(_lengths(part, size)) for part, size in zip(ends, sizes, strict=True)]
    else:
        texts = _compress_compiled(library, ends, sizes)
    return [
        {"size": [height, width], "counts": text}
        for (height, width), text in zip(sizes, texts, strict=True)
    ]


def _compress_compiled(
    library: Any, ends: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> list[bytes]:
    """The characters of all masks, by csrc/cpu/mask_postprocess.cpp."""
    counts, flat = [len(part) for part in ends], [side for size in sizes for side in size]
    joined = torch.cat([torch.empty(0, dtype=torch.int32), *ends])
    text, lengths = library.mask_postprocess_characters(joined, counts, flat)
    parts = text.split([CHARACTERS * (count + 1) for count in counts])
    return [_bytes(part[:length]) for part, length in zip(parts, lengths.tolist(), strict=True)]


def _lengths(ends: Tensor, size: tuple[int, int]) -> Tensor:
    bounds = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([size[0] * size[1]])])
    return bounds.long().diff()


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
    return _bytes(characters[begun].to(torch.uint8))


def _bytes(text: Tensor) -> bytes:
    return ctypes.string_at(text.data_ptr(), text.numel())
