"""The compiled CUDA implementation of the forward, csrc/cuda/token_image_attention.cu, behind torch's projections."""

from typing import Any

import torch
from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.token_image_attention.fallback import without_padding
from refsam_kernels.token_image_attention.outputs import Outputs
from refsam_kernels.token_image_attention.projection import Projection

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 512  # as csrc/cuda/token_image_attention.h
WIDEST_HEAD = 128  # likewise

_library = libraries.load("cuda")


def not_supported_reasons(
    queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, q_weight: Tensor, *others: Any
) -> list[str]:
    """Why the kernels cannot take these."""
    norm_weight, norm_bias, _, num_heads = others[-6:-2]
    (internal, channels), head = q_weight.shape, len(q_weight) // num_heads
    tensors = (queries, q_weight, norm_weight, norm_bias)
    reasons = [
        f"computes float32, float16 and bfloat16, got {dtype}"
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors)
        if dtype not in DTYPES
    ]
    for name, count, most in (
        ("channels", channels, WIDEST),
        ("internal channels", internal, WIDEST),
        ("channels in a head", head, WIDEST_HEAD),
    ):
        if count > most:
            reasons.append(f"takes at most {most} {name}, got {count}")
    return reasons + libraries.reasons_against_device(queries)


def forward(
    queries: Tensor,
    keys: Tensor,
    query_pe: Tensor,
    key_pe: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_lengths: Tensor | None,
    num_heads: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Like `reference.forward`: products in the dtype of the weights, sum, softmax and LayerNorm in float32."""
    if keep:  # the kernel does not look at padding, but what is kept of it must be finite
        keys, key_pe = without_padding(keys, key_pe, key_lengths)
    whole, remember = slice(len(queries)), not keep
    q = Projection(queries, query_pe, q_weight, q_bias, remember=remember)(whole)
    k = Projection(keys, key_pe, k_weight, None, remember=remember)(whole)
    v = Projection(keys, None, v_weight, None)(whole)
    added = torch.addmv(out_bias, out_weight, v_bias)
    lengths = key_lengths if key_lengths is None else key_lengths.contiguous()
    tensors = (q, k, v, queries, out_weight, added, norm_weight, norm_bias)
    out, x, statistics, attended, log_sum_exp = _library.token_image_attention(
        *(tensor.contiguous() for tensor in tensors), lengths, num_heads, eps, keep
    )
    if not keep:
        q, k, v = (queries.new_empty(0) for _ in range(3))
    return Outputs(out, x, statistics, q, k, v, attended, log_sum_exp)
