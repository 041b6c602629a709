"""Attention, residual and LayerNorm of SAM's two-way transformer, in the order of operations of segment-anything.

Follows `Attention` and `TwoWayAttentionBlock` of segment_anything/modeling/transformer.py: in float32 and without padding the
result has the same bits.
"""

import math

import torch
import torch.nn.functional as F

from refsam_kernels.core.gradients import derived_backward
from refsam_kernels.core.index_checks import valid_positions
from refsam_kernels.token_image_attention.inputs import Inputs, Outputs


def forward(inputs: Inputs) -> Outputs:
    """layer_norm(queries + out(attention(q(queries + query_pe), k(keys + key_pe), v(keys)))), in float32 at least.

    queries (P, Tq, C), keys (P, Tk, C), *_pe (P or 1, T, C), key_lengths (P,) or None -> (P, Tq, C) like queries, then with
    `keep` the values that a backward needs: see `Outputs`.
    """
    queries, keys, query_pe, key_pe, *_, key_lengths, num_heads, eps, keep = inputs
    q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias = inputs.weights
    norm_weight, norm_bias = inputs.norm_weight, inputs.norm_bias
    dtype = torch.promote_types(queries.dtype, torch.float32)
    valid = None
    if key_lengths is not None:
        valid = valid_positions(key_lengths, keys.shape[1])
        keys = torch.where(valid.unsqueeze(-1), keys, 0.0)
        key_pe = torch.where(valid.unsqueeze(-1), key_pe, 0.0)
    residual, keys = queries.to(dtype), keys.to(dtype)

    q = F.linear(residual + query_pe.to(dtype), q_weight.to(dtype), q_bias.to(dtype))
    k = F.linear(keys + key_pe.to(dtype), k_weight.to(dtype), k_bias.to(dtype))
    v = F.linear(keys, v_weight.to(dtype), v_bias.to(dtype))
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))

    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if valid is not None:
        logits = torch.where(valid[:, None, None], logits, float("-inf"))
    attended = (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)
    x = residual + F.linear(attended, out_weight.to(dtype), out_bias.to(dtype))
    out = F.layer_norm(x, x.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    if not keep:
        rest = (out.new_empty(0, dtype=queries.dtype) for _ in range(7))
        return Outputs(out.to(queries.dtype), *rest)
    mean = x.mean(dim=-1)
    variance = (x - mean.unsqueeze(-1)).square().mean(dim=-1)
    statistics = torch.stack([mean, torch.rsqrt(variance + eps)], dim=-1)
    constant = (q * k_bias.to(dtype).view(num_heads, 1, -1)).sum(-1) / math.sqrt(q.shape[-1])
    heads = (
        q.transpose(1, 2).flatten(2),
        F.linear(keys + key_pe.to(dtype), k_weight.to(dtype)),
        F.linear(keys, v_weight.to(dtype)),
        attended - v_bias.to(dtype),
    )
    channels_first = (t.mT.contiguous().to(q_weight.dtype) for t in heads)
    log_sum_exp = logits.logsumexp(dim=-1) - constant
    sums = (out.to(queries.dtype), x.contiguous(), statistics)
    return Outputs(*sums, *channels_first, log_sum_exp)  # type: ignore[call-arg]


backward = derived_backward(forward, *Inputs._fields[:14])  # all tensors but the lengths
