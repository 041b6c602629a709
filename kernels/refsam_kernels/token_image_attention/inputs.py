"""The arguments and results of `token_image_attention`."""

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionWeights(NamedTuple):
    """Weights of an attention layer as nn.Linear holds them: three (I, C), out (C, I); I is the internal width."""

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


class Inputs(NamedTuple):
    """The public function's arguments; `keep` asks for the values that the backward needs."""

    queries: Tensor
    keys: Tensor
    query_pe: Tensor
    key_pe: Tensor
    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    key_lengths: Tensor | None
    num_heads: int
    eps: float
    keep: bool

    @property
    def weights(self) -> AttentionWeights:
        """The projections' weights."""
        return AttentionWeights(*self[4:12])


class Outputs(NamedTuple):
    """`out` (P, Tq, C) like the queries; the rest is float32 at least unless stated, without elements where nothing is kept.

    x: (P, Tq, C), the sum before the LayerNorm; statistics: (P, Tq, 2), its means and reciprocal deviations.
    q, k, v, attended: (P, I, T) in the dtype of the weights, the heads' queries, keys, values and attended values; padded keys
    and values are finite.
    log_sum_exp: (P, heads, Tq), of the logits.
    k, v and attended leave out the biases of k and v: the first changes no softmax, the second is added
    after it.
    """

    out: Tensor
    x: Tensor
    statistics: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    log_sum_exp: Tensor


def empty_outputs(inputs: Inputs) -> Outputs:
    """Uninitialised, contiguous outputs."""
    queries, weight = inputs.queries, inputs.q_weight
    out = queries.new_empty(queries.shape)
    if not inputs.keep:
        return Outputs(out, *(queries.new_empty(0) for _ in range(7)))
    expressions, tokens, _ = queries.shape
    internal, wide = len(weight), torch.promote_types(weight.dtype, torch.float32)
    x = queries.new_empty(queries.shape, dtype=torch.promote_types(queries.dtype, torch.float32))
    statistics = x.new_empty(expressions, tokens, 2)
    q, attended = (weight.new_empty(expressions, internal, tokens) for _ in range(2))
    k, v = (weight.new_empty(expressions, internal, inputs.keys.shape[1]) for _ in range(2))
    log_sum_exp = weight.new_empty(expressions, inputs.num_heads, tokens, dtype=wide)
    return Outputs(out, x, statistics, q, k, v, attended, log_sum_exp)
