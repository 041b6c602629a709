"""`int8_linear` as its definition says, products and sums in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F

from refsam_kernels.int8_linear.inputs import Inputs
from refsam_kernels.int8_linear.weights import Int8Weights, unpack

LARGEST = 255  # of the unsigned bytes that rows become
SMALLEST_SCALE = 1.2e-38


def forward(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Tensor:
    """`residual + second(gelu(first(norm(x))))`, each layer on quantised rows."""
    x = inputs.x.float()
    if inputs.norm_weight is not None:
        x = F.layer_norm(x, (inputs.in_channels,), inputs.norm_weight, inputs.norm_bias, inputs.eps)
    result = product(x, inputs.first, dtype)
    if inputs.second is not None:
        result = product(F.gelu(result.float()), inputs.second, dtype)
    if inputs.residual is not None:
        result = result + inputs.residual
    return result.to(torch.bfloat16 if inputs.as_bfloat16 else torch.float32)


def product(x: Tensor, weights: Int8Weights, dtype: torch.dtype) -> Tensor:
    """Float32 rows (..., in), quantised, times the weights, plus the bias: (..., out) in this dtype."""
    steps, scale = quantise_rows(x)
    packed, weight_scale, _, bias, in_channels, out_channels = weights
    integers = unpack(packed, in_channels, out_channels).to(dtype)
    factor = scale.to(dtype) * weight_scale[:out_channels].to(dtype)
    return F.linear(steps.to(dtype), integers) * factor + bias[:out_channels].to(dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., C) as whole numbers of steps, -255 to 255, float32, and the steps' size (..., 1).

    A row's range from its smallest to its largest value, zero included, is cut into 255 steps. A row with a value that is
    not finite has steps of NaN.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high / 2 - low / 2) / (LARGEST / 2)  # halves: the whole range may be beyond float32's
    is_usable = scale > SMALLEST_SCALE
    is_finite = x.isfinite().all(-1, keepdim=True)
    inverse = torch.where(is_usable & is_finite, 1 / scale, 0)
    zero = (-low * inverse).nan_to_num().round()
    steps = (x.nan_to_num() * inverse).round().clamp(-zero, LARGEST - zero)
    scale = torch.where(is_usable, scale, 0).masked_fill(~is_finite, float("nan"))
    return steps, scale
