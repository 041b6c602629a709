"""The compiled CPU implementation, csrc/cpu/rel_pos_attention*: flash attention that makes the relative terms on the fly.

The kernels are compiled for several instruction sets and the library takes the best that the processor has.
`REFSAM_CPU_INSTRUCTION_SET` names another one; see `libraries.instruction_set`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.core.libraries import instruction_set
from refsam_kernels.core.reasons import dtype_reasons, limit_reasons
from refsam_kernels.rel_pos_attention.inputs import Inputs, Outputs

LARGEST_HEAD_DIM = 1024  # as csrc/rel_pos_attention_check.h

_library = libraries.load("cpu")


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the library cannot compute these; empty if it can."""
    limit = ("channels in a head", inputs.head_dim, LARGEST_HEAD_DIM)
    return dtype_reasons((torch.float32, torch.bfloat16), inputs.qkv) + limit_reasons(limit)


def forward(inputs: Inputs) -> Outputs:
    """Output (B, h, w, D) and the logarithm of each softmax's sum (B, heads, h, w), float32."""
    results = _library.rel_pos_attention(*compact(inputs), *inputs[4:], instruction_set())
    return Outputs(*results)


def backward(
    inputs: Inputs, outputs: Outputs, grads: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients with respect to qkv, both tables and the bias of padding tokens."""
    tensors = (grads[0].contiguous(), *compact(inputs), *map(Tensor.contiguous, outputs))
    options = (*inputs[4:], needs[1] or needs[2], instruction_set())
    *gradients, grad_padding = _library.rel_pos_attention_backward(*tensors, *options)
    # Padding is never a query.
    return [*gradients, F.pad(grad_padding, (grad_padding.numel() // 2, 0))]


def compact(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors as the library takes them: qkv with any strides but the last, the others contiguous."""
    qkv, rel_pos_h, rel_pos_w, qkv_bias, *_ = inputs
    return (
        qkv if qkv.stride(-1) == 1 else qkv.contiguous(),
        rel_pos_h.contiguous(),
        rel_pos_w.contiguous(),
        None if qkv_bias is None else qkv_bias.contiguous(),
    )
