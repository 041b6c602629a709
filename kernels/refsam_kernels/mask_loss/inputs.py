"""The arguments and results of `mask_loss`."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The public function's arguments."""

    logits: Tensor
    targets: Tensor
    ignore: Tensor | None
    image_size: int
    input_size: Sequence[int]
    alpha: float
    gamma: float


class Outputs(NamedTuple):
    """Both losses (P,); for the backward, sums (4, P) over pixels that count: probability * target, probability, target, 1."""

    focal: Tensor
    dice: Tensor
    sums: Tensor
