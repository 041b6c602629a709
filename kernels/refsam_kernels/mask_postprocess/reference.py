"""Mask logits to masks as segment-anything does it: `Sam.postprocess_masks` of segment_anything/modeling/sam.py.

Packed bits and runs are defined here too: other backends give the same words, statistics and runs for the same logits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.mask_postprocess.inputs import Bits, BitsInputs, Inputs, Runs, RunsInputs
from refsam_kernels.mask_postprocess.layout import WORD, pairs, unpack


def forward(inputs: Inputs) -> Tensor:
    """Logits (P, 4h, 4w) to masks (P, H, W) bool."""
    return resize_twice(*inputs[:4]) > inputs.threshold


def bits(inputs: BitsInputs) -> Bits:
    """Logits (P, 4h, 4w), and 2 P numbers of each list -> words (n,) int32 and statistics (P, 8) int64; see `layout`."""
    logits, image_size, input_sizes, output_sizes, threshold, stability_offset = inputs
    words, statistics = [logits.new_empty(0, dtype=torch.int32)], []
    sizes = zip(logits, pairs(input_sizes), pairs(output_sizes), strict=True)
    for mask_logits, input_size, output_size in sizes:
        full = resize_twice(mask_logits.unsqueeze(0), image_size, input_size, output_size)[0]
        words.append(pack(full > threshold))
        statistics.append(describe(full, threshold, stability_offset))
    joined = torch.stack(statistics) if statistics else no_statistics(logits)
    return Bits(torch.cat(words), joined)


def runs(inputs: RunsInputs) -> Runs:
    """Words of packed masks -> where runs end (capacity,) int32, mask after mask, and how many do (P,) int64."""
    words, output_sizes, capacity = inputs
    ends = [run_ends(mask) for mask in unpack(words, pairs(output_sizes))]
    found = torch.cat([words.new_empty(0), *ends])[:capacity]
    counts = torch.tensor([len(e) for e in ends], dtype=torch.int64, device=words.device)
    return Runs(F.pad(found, (0, capacity - len(found))), counts)


def resize_twice(
    logits: Tensor, image_size: int, input_size: Sequence[int], output_size: Sequence[int]
) -> Tensor:
    """Logits (P, 4h, 4w), bilinearly to the square of image_size, cropped to input_size, bilinearly to (P, H, W)."""
    height, width = input_size
    square = (image_size, image_size)
    image = F.interpolate(logits.unsqueeze(1), square, mode="bilinear", align_corners=False)
    image = image[..., :height, :width]
    output = F.interpolate(image, tuple(output_size), mode="bilinear", align_corners=False)
    return output.squeeze(1)


def pack(mask: Tensor) -> Tensor:
    """A mask (H, W) bool as words (W * ceil(H / 32),) int32: columns one after another, the lowest bit on top."""
    rows = F.pad(mask, (0, 0, 0, -mask.shape[0] % WORD)).unflatten(0, (-1, WORD))
    words = rows.new_zeros(len(rows), mask.shape[1], dtype=torch.int32)
    for bit in range(WORD):
        words.add_(rows[:, bit], alpha=1 << bit if bit < WORD - 1 else -(1 << bit))  # the sign
    return words.T.flatten()


def describe(full: Tensor, threshold: float, stability_offset: float) -> Tensor:
    """The statistics (8,) int64 of logits (H, W) at full size, as `layout.STATISTICS` lists them."""
    mask = full > threshold
    counts = [mask, full > threshold + stability_offset, full > threshold - stability_offset]
    areas = torch.stack([count(marked) for marked in counts])
    return torch.cat([areas, box(mask), count(full.isnan())[None]])


def box(mask: Tensor) -> Tensor:
    """Left, top, right and bottom (4,) int64 of a mask (H, W) bool, the last two outside it; zeros if it is empty."""
    marks = mask.view(torch.uint8)  # `any` and `sum` of bool are many times slower on a CPU
    left, right = extent(marks.amax(dim=0).bool())
    top, bottom = extent(marks.amax(dim=1).bool())
    return torch.stack([left, top, right, bottom])


def count(marked: Tensor) -> Tensor:
    """Number of True entries of a bool tensor, which has at most 2^31: () int64."""
    return marked.view(torch.uint8).sum(dtype=torch.int32).long()


def extent(used: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry of (n,) bool that is True and the one behind the last; 0 and 0 if there is none."""
    position = torch.arange(len(used), device=used.device)
    first = torch.where(used, position, len(used)).amin() % len(used)
    return first, torch.where(used, position + 1, 0).amax()


def run_ends(mask: Tensor) -> Tensor:
    """Positions (n,) int32 at which a mask (H, W) bool changes its value, in column-major order, beginning with False."""
    pixels = F.pad(mask.T.flatten(), (1, 0))
    return (pixels[1:] != pixels[:-1]).nonzero().flatten().int()


def no_statistics(logits: Tensor) -> Tensor:
    """The statistics of no mask."""
    return logits.new_empty(0, 8, dtype=torch.int64)
