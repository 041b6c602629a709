"""The compiled CPU implementation, csrc/cpu/int8_linear*: blocks of rows go through all steps while they are in the cache."""

from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.core.libraries import instruction_set
from refsam_kernels.int8_linear.inputs import Inputs

_library = libraries.load("cpu")


def forward(inputs: Inputs) -> Tensor:
    """See `reference.forward`."""
    x, tensors, numbers = inputs.x, inputs[1:12], inputs[12:]
    rows = x.reshape(-1, inputs.in_channels)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    dense = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
    result = _library.int8_linear(rows, *dense, *numbers, instruction_set())
    return result.view(*x.shape[:-1], inputs.out_channels)
