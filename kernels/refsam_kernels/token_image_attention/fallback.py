"""Attention, residual and LayerNorm around PyTorch's fused attention, which never stores the scores.

The backward computes the scores by plain products instead: PyTorch's own backward is not deterministic on every device.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.chunks import chunked_gradients, chunks, map_chunks
from refsam_kernels.values import valid_positions

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def forward(*arguments: Any) -> Tensor:
    """Like `reference.forward`: products in the dtype of the weights, sum and LayerNorm in float32 at least."""
    *tensors, num_heads, eps = arguments
    formula = partial(_formula, F.scaled_dot_product_attention, num_heads=num_heads, eps=eps)
    return map_chunks(formula, tensors, _per_expression(tensors), _slices(tensors))


def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Like `reference.backward`; everything is computed again."""
    *tensors, num_heads, eps, needs = arguments
    formula = partial(_formula, _attend_by_products, num_heads=num_heads, eps=eps)
    split, slices = _per_expression(tensors), _slices(tensors)
    return chunked_gradients(formula, tensors, split, slices, [*needs, False], grad)[:-1]


def _per_expression(tensors: Sequence[Tensor]) -> list[bool]:
    """Queries, keys and lengths are the expressions' own, positions may be shared, weights always are."""
    queries, _, query_pe, key_pe = tensors[:4]
    own = [len(positions) == len(queries) for positions in (query_pe, key_pe)]
    return [True, True, *own, *[False] * 10, True]


def _slices(tensors: Sequence[Tensor]) -> list[slice]:
    queries, keys = tensors[:2]
    elements = max(queries.shape[1], keys.shape[1]) * queries.shape[2]
    return list(chunks(len(queries), elements, queries.device))


def _formula(
    attend: Attention,
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
) -> Tensor:
    mask = None
    if key_lengths is not None:
        valid = valid_positions(key_lengths, keys.shape[1])
        keys = torch.where(valid.unsqueeze(-1), keys, 0.0)
        key_pe = torch.where(valid.unsqueeze(-1), key_pe, 0.0)
        mask = valid[:, None, None]
    q = F.linear((queries + query_pe).to(q_weight.dtype), q_weight, q_bias)
    k = F.linear((keys + key_pe).to(k_weight.dtype), k_weight, k_bias)
    v = F.linear(keys.to(v_weight.dtype), v_weight, v_bias)
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    attended = attend(q, k, v, mask).transpose(1, 2).flatten(2)

    dtype = torch.promote_types(queries.dtype, torch.float32)
    x = queries.to(dtype) + F.linear(attended, out_weight, out_bias)
    return F.layer_norm(x, x.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps).to(
        queries.dtype
    )


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with q, k, v (P, heads, T, d) and mask (P, 1, 1, Tk)."""
    logits = q * q.shape[-1] ** -0.5 @ k.mT
    if mask is not None:
        logits = torch.where(mask, logits, float("-inf"))
    return logits.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v
