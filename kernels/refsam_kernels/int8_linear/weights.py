"""Weights of a linear layer as 8-bit integers, in the layout in which the CPU's instructions multiply them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from refsam_kernels.core.checks import check_shape, require

BLOCK, GROUP = 16, 4  # as csrc/cpu/int8_linear.h
LARGEST = 127
MOST_INPUTS = 65536  # beyond it a sum could leave 32 bits


class Int8Weights(NamedTuple):
    """A linear layer whose weights are `scale` times integers in each output channel, made by `quantise_weights`.

    packed (blocks, groups, 16, 4) int8: 16 output and 4 input channels side by side. scale, sums (of the integers over
    the inputs, int32) and bias: (blocks * 16,), float32. Padding is zeros.
    """

    packed: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor
    in_channels: int
    out_channels: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operator's tensors, without the numbers of channels."""
        return self[:4]


def quantise_weights(weight: Tensor, bias: Tensor | None = None) -> Int8Weights:
    """A linear layer's weights (out, in) and bias (out,), floating point, rounded to 255 steps per output channel.

    The largest weight of a channel is exact. Raises ValueError for other shapes, dtypes or values that are not finite.
    """
    check_shape("weight", weight, ("out", "in"))
    require(weight.is_floating_point(), "weight", weight.dtype, "a floating point dtype")
    out_channels, in_channels = weight.shape
    fits = out_channels > 0 and 0 < in_channels <= MOST_INPUTS
    wanted = f"at least one output and 1 to {MOST_INPUTS} inputs"
    require(fits, "weight", f"shape {tuple(weight.shape)}", wanted)
    weight = weight.detach().float()
    require(bool(weight.isfinite().all()), "weight", "NaN or infinity", "finite values")
    if bias is None:
        bias = weight.new_zeros(out_channels)
    check_shape("bias", bias, (out_channels,))
    scale = weight.abs().amax(1) / LARGEST
    integers = (weight / torch.where(scale > 0, scale, 1.0)[:, None]).round()
    integers = F.pad(integers, (0, -in_channels % GROUP, 0, -out_channels % BLOCK))
    integers = integers.to(torch.int8)
    blocks = integers.view(-1, BLOCK, integers.shape[1] // GROUP, GROUP)
    padding = (0, -out_channels % BLOCK)
    return Int8Weights(
        blocks.transpose(1, 2).contiguous(),
        F.pad(scale, padding),
        integers.sum(1, dtype=torch.int32),
        F.pad(bias.detach().float(), padding),
        in_channels,
        out_channels,
    )


def unpack(packed: Tensor, in_channels: int, out_channels: int) -> Tensor:
    """The integers (out, in) of packed weights."""
    blocks, groups = packed.shape[:2]
    integers = packed.transpose(1, 2).reshape(blocks * BLOCK, groups * GROUP)
    return integers[:out_channels, :in_channels]
