"""The definition of `rel_pos_attention_int8`: segment-anything's order of operations on rounded queries and keys."""

import torch
from torch import Tensor

from refsam_kernels.rel_pos_attention.inputs import Inputs
from refsam_kernels.rel_pos_attention.reference import (
    add_rel_pos,
    join_heads,
    mask_padding,
    pad,
    partition,
    split_heads,
    unpartition,
)

LARGEST = 127  # integers on either side of zero
SMALLEST_STEP = 1.2e-38


def forward(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Tensor:
    """Output (B, h, w, D), computed in this dtype."""
    qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pad_mode = inputs
    h, w = qkv.shape[1:3]
    height, width = (window_size, window_size) if window_size else (h, w)
    windows, rows, columns = partition(pad(qkv, qkv_bias, height, width), height, width)
    q, k, v = split_heads(windows, num_heads)
    logits = (rounded(q).to(dtype) * q.shape[-1] ** -0.5) @ rounded(k).to(dtype).mT
    tables = (rel_pos_h.to(dtype), rel_pos_w.to(dtype))
    logits = add_rel_pos(logits, q.to(dtype), *tables, height, width)
    if pad_mode == "mask":
        logits = mask_padding(logits, qkv, num_heads, height, width)
    out = join_heads(logits.softmax(-1) @ v.to(dtype), num_heads, height, width)
    return unpartition(out, rows, columns)[:, :h, :w].to(qkv.dtype).contiguous()


def rounded(tokens: Tensor) -> Tensor:
    """Tokens (..., head_dim) as multiples of 1/127 of their largest value, float32; NaN if a value is not finite."""
    tokens = tokens.float()
    step = tokens.abs().amax(-1, keepdim=True) / LARGEST
    is_finite = tokens.isfinite().all(-1, keepdim=True)
    inverse = torch.where(is_finite & (step > SMALLEST_STEP), 1 / step, 0)
    integers = (tokens.nan_to_num() * inverse).round()
    return (integers * step.nan_to_num()).masked_fill(~is_finite, float("nan"))
