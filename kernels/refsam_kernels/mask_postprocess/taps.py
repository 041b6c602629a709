"""SAM's two bilinear resizes as a few neighbouring taps per output position, in tables on the device.

The weights are those of `resize.resize_matrix`, so positions are rounded as PyTorch rounds them. Tables are kept between calls: a
video, or a CUDA graph that was warmed up, copies none to the device.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from refsam_kernels.mask_postprocess.layout import words_of
from refsam_kernels.mask_postprocess.resize import resize_matrix

# More than SAM's sizes need (3), enough for any enlargement (4); a strong reduction between the resizes needs more.
MOST_TAPS = 8

Size = tuple[int, int]


@dataclass(frozen=True)
class Taps:
    """Output position i of an axis is sum_k weights[k, i] * input[start[i] + k]; several outputs may be concatenated.

    start (n,) int32, weights (K, n) float32. Input j takes part in the outputs first[j] to behind[j] - 1 (low,) int32, of the
    first output only; both grow with j.
    """

    start: Tensor
    weights: Tensor
    first: Tensor
    behind: Tensor

    @property
    def count(self) -> int:
        """K, the taps of an output position."""
        return len(self.weights)


@lru_cache(maxsize=64)
def taps_of(low: int, image_size: int, sizes: tuple[Size, ...], device: torch.device) -> Taps:
    """The resizes low -> image_size -> crop -> output along one axis, for every (crop, output) of `sizes`."""
    matrices = [resize_matrix(low, image_size, *size, torch.float32) for size in sizes]
    matrix = torch.cat(matrices)
    used = matrix != 0
    position = torch.arange(low)
    start = torch.where(used, position, low).amin(dim=1)
    count = int((torch.where(used, position + 1, 0).amax(dim=1) - start).max())
    start = start.clamp(max=low - count)
    weights = matrix.gather(1, start[:, None] + torch.arange(count)).T.contiguous()
    begins = start[: len(matrices[0])].contiguous()
    first = torch.searchsorted(begins, position - count, right=True)
    behind = torch.searchsorted(begins, position, right=True)
    tables = (start.int(), weights, first.int(), behind.int())
    return Taps(*(table.to(device) for table in tables))


@dataclass(frozen=True)
class Places:
    """Positions of the taps and words of P masks of any size.

    table (P, 5) int64: height, width, where the mask's rows and its columns begin in the taps, where its words begin. `sizes`
    are the different (height, width) of the masks.
    """

    table: Tensor
    rows: Taps
    columns: Taps
    sizes: tuple[Size, ...]

    @property
    def most_words(self) -> int:
        """Number of words of the largest mask."""
        return max(words_of(*size) for size in self.sizes)


@lru_cache(maxsize=32)
def places_of(
    low_size: Size,
    image_size: int,
    input_sizes: tuple[Size, ...],
    output_sizes: tuple[Size, ...],
    device: torch.device,
) -> Places:
    """The places of at least one mask; masks of the same size share their taps."""
    axes, offsets = [], []
    for axis in (0, 1):
        sizes = [(c[axis], o[axis]) for c, o in zip(input_sizes, output_sizes, strict=True)]
        distinct = tuple(dict.fromkeys(sizes))
        begins = list(accumulate((output for _, output in distinct), initial=0))
        axes.append(taps_of(low_size[axis], image_size, distinct, device))
        offsets.append([begins[distinct.index(size)] for size in sizes])
    words = list(accumulate((words_of(*size) for size in output_sizes), initial=0))
    heights, widths = zip(*output_sizes, strict=True)
    table = torch.tensor([heights, widths, *offsets, words[:-1]]).T.contiguous()
    return Places(table.to(device), axes[0], axes[1], tuple(dict.fromkeys(output_sizes)))
