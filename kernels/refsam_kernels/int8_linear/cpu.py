"""The compiled CPU implementation, csrc/cpu/int8_linear*: blocks of rows go through all steps while they are in the cache."""

from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.core.libraries import instruction_set
from refsam_kernels.int8_linear.inputs import Inputs

_library = libraries.load("cpu")


def forward(inputs: Inputs) -> Tensor:
    """See `reference.forward`."""
    x, *rest = inputs
    rows = x.reshape(-1, inputs.in_channels)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    tensors = [tensor if tensor is None else tensor.contiguous() for tensor in rest[:11]]
    result = _library.int8_linear(rows, *tensors, *rest[11:], instruction_set())
    return result.view(*x.shape[:-1], inputs.out_channels)
