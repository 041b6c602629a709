"""The arguments and results of `mask_postprocess` and of its packed forms.

Sizes of several masks are flat: (height, width, height, width, ...).
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `mask_postprocess`; the logits are float32."""

    logits: Tensor
    image_size: int
    input_size: Sequence[int]
    output_size: Sequence[int]
    threshold: float


class BitsInputs(NamedTuple):
    """The arguments of the operator that packs masks; sizes of every mask."""

    logits: Tensor
    image_size: int
    input_sizes: Sequence[int]
    output_sizes: Sequence[int]
    threshold: float
    stability_offset: float


class Bits(NamedTuple):
    """Packed masks (n,) int32 and statistics (P, 8) int64; see `layout`."""

    words: Tensor
    statistics: Tensor


class RunsInputs(NamedTuple):
    """Packed masks, their sizes, and how many ends of runs there is room for."""

    words: Tensor
    output_sizes: Sequence[int]
    capacity: int


class Runs(NamedTuple):
    """Ends of runs (capacity,) int32, mask after mask, and how many each mask has, (P,) int64."""

    ends: Tensor
    counts: Tensor
