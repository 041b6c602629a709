"""Convolutions with weights in oneDNN's own layout, for inference on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn

from refsam_kernels import can_prepack

# oneDNN's names of the activations.
ACTIVATIONS = {None: "none", "relu6": "hardtanh", "relu": "relu", "silu": "swish"}


def can_pack(convolution: nn.Conv2d) -> bool:
    """Whether this torch has the operators, which torch.compile calls, for such a weight."""
    return (
        can_prepack(convolution.weight)
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    )


class PackedConv:
    """A convolution and its activation as one; needs `can_pack`. The module's weight must not change afterwards."""

    def __init__(self, convolution: nn.Conv2d, activation: str | None = None) -> None:
        self._weight, self._bias = convolution.weight, convolution.bias
        self._sizes = (
            convolution.padding,
            convolution.stride,
            convolution.dilation,
            convolution.groups,
        )
        self._activation = ACTIVATIONS[activation]
        self._limits: list[float | None] = [0.0, 6.0] if activation == "relu6" else []
        # The layout depends on the shape of an input, not on the batch size.
        self._packed: tuple[torch.Size, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, h, w), channels last for speed, to (B, C', h / stride, w / stride)."""
        packed = self._packed  # another thread may pack for another shape at the same time
        if packed is None or packed[0] != x.shape[1:]:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its types are wrong
            packed = x.shape[1:], reorder(self._weight.to_mkldnn(), *self._sizes, x.shape)
            self._packed = packed
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed[1], self._bias, *self._sizes, self._activation, self._limits, ""
        )
