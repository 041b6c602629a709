"""What the forward gives: the result, and with `keep` what its backward wants to know."""

from typing import NamedTuple

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """`out` (P, Tq, C) like the queries; the rest has no elements where nothing is kept, and float32 at least where not said.

    x: (P, Tq, C), the sum before the LayerNorm; statistics: (P, Tq, 2), its means and reciprocal deviations.
    q, k, v, attended: (P, I, T) in the dtype of the weights, queries, keys, values and what is attended to in the heads; keys and
    values that are padding are finite, whatever they are.
    log_sum_exp: (P, heads, Tq), of the logits.
    k, v and what follows from them are without the biases of k and v: the first changes no softmax, the second can be added
    behind it.
    """

    out: Tensor
    x: Tensor
    statistics: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    log_sum_exp: Tensor


def empty_outputs(
    queries: Tensor, keys: Tensor, q_weight: Tensor, num_heads: int, keep: bool
) -> Outputs:
    """Uninitialised, contiguous outputs."""
    out = queries.new_empty(queries.shape)
    if not keep:
        return Outputs(out, *(queries.new_empty(0) for _ in range(7)))
    expressions, tokens, _ = queries.shape
    internal, wide = len(q_weight), torch.promote_types(q_weight.dtype, torch.float32)
    x = queries.new_empty(queries.shape, dtype=torch.promote_types(queries.dtype, torch.float32))
    statistics = x.new_empty(expressions, tokens, 2)
    q, attended = (q_weight.new_empty(expressions, internal, tokens) for _ in range(2))
    k, v = (q_weight.new_empty(expressions, internal, keys.shape[1]) for _ in range(2))
    log_sum_exp = q_weight.new_empty(expressions, num_heads, tokens, dtype=wide)
    return Outputs(out, x, statistics, q, k, v, attended, log_sum_exp)
