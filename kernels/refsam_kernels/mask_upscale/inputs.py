"""The arguments of `mask_upscale`."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The public function's arguments."""

    features: Tensor
    hyper: Tensor
    conv1_weight: Tensor
    conv1_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor
    feat_s1: Tensor | None
    feat_s0: Tensor | None
    eps: float
