"""The compiled CPU implementation, csrc/cpu/rel_pos_attention_int8*: the flash attention of `rel_pos_attention`."""

from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.core.libraries import instruction_set
from refsam_kernels.rel_pos_attention.cpu import compact, not_supported_reasons
from refsam_kernels.rel_pos_attention.inputs import Inputs

__all__ = ["forward", "not_supported_reasons"]

_library = libraries.load("cpu")


def forward(inputs: Inputs) -> Tensor:
    """See `reference.forward`."""
    return _library.rel_pos_attention_int8(*compact(inputs), *inputs[4:], instruction_set())
