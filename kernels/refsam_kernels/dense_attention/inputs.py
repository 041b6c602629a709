"""The arguments of `dense_attention`."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The public function's arguments."""

    features: Tensor
    text: Tensor
    lengths: Tensor
    image_index: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    level_weights: Tensor
