"""`rel_pos_attention_int8` in plain PyTorch: the definition in float32, head by head; for devices without a compiled library."""

import torch
from torch import Tensor

from refsam_kernels.rel_pos_attention.inputs import Inputs
from refsam_kernels.rel_pos_attention.int8 import reference
from refsam_kernels.rel_pos_attention.windows import split_qkv


def forward(inputs: Inputs) -> Tensor:
    """See `reference.forward`."""
    heads = split_qkv(inputs.qkv, inputs.num_heads).unbind(-2)
    bias = inputs.qkv_bias
    biases = [None] * len(heads) if bias is None else split_qkv(bias, inputs.num_heads).unbind(1)
    results = []
    for head, of_bias in zip(heads, biases, strict=True):
        alone = inputs._replace(
            qkv=head.movedim(0, -2).flatten(-2),
            qkv_bias=None if of_bias is None else of_bias.flatten(),
            num_heads=1,
        )
        results.append(reference.forward(alone, torch.float32))
    return torch.cat(results, -1)
