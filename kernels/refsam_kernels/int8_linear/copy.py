"""Quantised copies of linear modules' weights, for modules that stay as they are."""

import torch
from torch import Tensor, nn

from refsam_kernels.int8_linear.op import DTYPES, int8_linear
from refsam_kernels.int8_linear.weights import Int8Weights, quantise_weights
from refsam_kernels.packed_linear import LinearCopy, may_stand_in


class Int8Copy(LinearCopy[Int8Weights]):
    """A quantised copy of a linear module's weights."""

    def __init__(self) -> None:
        super().__init__(quantise_weights)

    @staticmethod
    def is_supported(module: nn.Module, x: Tensor) -> bool:
        """Whether it may stand for the module: `may_stand_in`, on a CPU, in a dtype that `int8_linear` takes."""
        return (
            may_stand_in(module, x)
            and x.device.type == module.weight.device.type == "cpu"
            and x.dtype in DTYPES
        )

    def __call__(self, module: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., in) to (..., out) of this dtype; `is_supported` must hold."""
        return int8_linear(x, self.of(module), dtype=dtype)
