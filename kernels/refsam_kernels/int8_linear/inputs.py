"""The arguments of `int8_linear`."""

from typing import NamedTuple

from torch import Tensor

from refsam_kernels.int8_linear.weights import Int8Weights


class Inputs(NamedTuple):
    """Rows, one or two quantised layers, a layer norm before them and a residual behind them.

    hidden_channels is 0 where there is one layer.
    """

    x: Tensor
    packed: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor
    packed2: Tensor | None
    scale2: Tensor | None
    sums2: Tensor | None
    bias2: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    residual: Tensor | None
    in_channels: int
    hidden_channels: int
    out_channels: int
    eps: float
    as_bfloat16: bool

    @property
    def first(self) -> Int8Weights:
        """The first layer."""
        out_channels = self.hidden_channels or self.out_channels
        return Int8Weights(*self[1:5], self.in_channels, out_channels)

    @property
    def second(self) -> Int8Weights | None:
        """The layer behind the GELU, if there is one."""
        if self.packed2 is None:
            return None
        return Int8Weights(*self[5:9], self.hidden_channels, self.out_channels)  # type: ignore[arg-type]
