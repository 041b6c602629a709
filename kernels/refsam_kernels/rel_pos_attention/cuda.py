"""The compiled CUDA implementation of the forward, csrc/cuda/rel_pos_attention*: flash attention on tensor cores.

It has no backward: saved outputs mean the same in every backend, so another one runs it (see `refsam_kernels.core.dispatch`).
"""

import torch
from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.core.reasons import dtype_reasons, limit_reasons
from refsam_kernels.rel_pos_attention.inputs import Inputs, Outputs

HEAD_DIMS = (32, 64, 80)  # as csrc/cuda/rel_pos_attention.h
LARGEST_SIDES = 192  # as csrc/cuda/rel_pos_attention.h: rows plus columns of a window's keys
ALIGNMENT = 16  # bytes that are copied at a time

_library = libraries.load("cuda")


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernels cannot compute these; empty if they can."""
    qkv, window_size, pad_mode = inputs.qkv, inputs.window_size, inputs.pad_mode
    reasons = dtype_reasons((torch.float16, torch.bfloat16), qkv)
    if inputs.head_dim not in HEAD_DIMS:
        wanted = ", ".join(map(str, HEAD_DIMS))
        reasons.append(f"has kernels for {wanted} channels in a head, got {inputs.head_dim}")
    key_height, key_width = (
        window_size if window_size and (pad_mode == "bias" or window_size < side) else side
        for side in qkv.shape[1:3]
    )
    reasons += limit_reasons(("rows and columns of keys", key_height + key_width, LARGEST_SIDES))
    return reasons + libraries.reasons_against_device(qkv)


def forward(inputs: Inputs) -> Outputs:
    """Output (B, h, w, D) and the logarithm of each softmax's sum (B, heads, h, w), float32."""
    qkv, rel_pos_h, rel_pos_w, qkv_bias, *options = inputs
    tensors = (
        qkv if is_readable(qkv) else qkv.clone(memory_format=torch.contiguous_format),
        *(table if table is None else compact(table) for table in (rel_pos_h, rel_pos_w, qkv_bias)),
    )
    return Outputs(*_library.rel_pos_attention(*tensors, *options))


def is_readable(tensor: Tensor) -> bool:
    """Whether its last dimension can be copied 16 bytes at a time where it lies."""
    *strides, last = tensor.stride()
    places = (tensor.data_ptr(), *(stride * tensor.element_size() for stride in strides))
    return last == 1 and not any(place % ALIGNMENT for place in places)


def compact(tensor: Tensor) -> Tensor:
    """The tensor without gaps, in memory that begins at a multiple of 16 bytes."""
    is_aligned = tensor.data_ptr() % ALIGNMENT == 0
    return (
        tensor.contiguous() if is_aligned else tensor.clone(memory_format=torch.contiguous_format)
    )
