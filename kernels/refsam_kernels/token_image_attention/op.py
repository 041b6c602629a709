"""Attention between tokens and image, either way, with its residual and LayerNorm."""

from typing import Any

import torch
from torch import Tensor

from refsam_kernels.core.checks import (
    autocast,
    autocast_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    require,
)
from refsam_kernels.core.flops import Product, counts, linear
from refsam_kernels.core.index_checks import check_range
from refsam_kernels.core.registration import Operator, needs_gradient
from refsam_kernels.token_image_attention.inputs import (
    AttentionWeights,
    Inputs,
    Outputs,
    empty_outputs,
)

operator = Operator("token_image_attention", Inputs, Outputs)


_forward = operator.forward(empty_outputs)
operator.differentiate({"grad": "out"}, saved=Outputs._fields[1:], frozen=["key_lengths"])


@counts(operator)
def _products(inputs: Any) -> list[Product]:
    (expressions, queries, _), keys, internal = inputs.queries, inputs.keys[1], inputs.q_weight[0]
    return [
        *linear(expressions * queries, inputs, "q_weight", "out_weight"),
        *linear(expressions * keys, inputs, "k_weight", "v_weight"),
        (4 * expressions * queries * keys * internal, None),
    ]


def token_image_attention(
    queries: Tensor,
    keys: Tensor,
    query_pe: Tensor,
    key_pe: Tensor,
    weights: AttentionWeights,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    num_heads: int,
    key_lengths: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Attention of tokens and image: `layer_norm(queries + out(attention(q(queries + query_pe), k(keys + key_pe), v(keys))))`.

    For both directions of SAM's two-way transformer, tokens to image and image to tokens, and for attention among tokens. Follows
    `TwoWayAttentionBlock` of segment_anything/modeling/transformer.py.

    Args:
        queries: (P, Tq, C) floating point.
        keys: (P, Tk, C); also the values, there without positions.
        query_pe, key_pe: positions, (P, T, C), or (1, T, C) where all expressions share them.
        weights: of the four projections. The internal width `weights.q_weight.shape[0]` is a multiple of `num_heads`.
        norm_weight, norm_bias: (C,), of the LayerNorm.
        num_heads: number of heads.
        key_lengths: (P,) int64 in 1..Tk, valid keys; later keys and positions change nothing, NaN included. None: all are valid.
        eps: of the LayerNorm.
        backend: name of the backend; None lets the library choose.

    Returns:
        (P, Tq, C) in the dtype of the queries. Autocast lowers the dtype of the products only, not of the residual; under it the
        keys may have another dtype.

    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the requested backend cannot run.
    """
    if autocast_dtype(queries.device) is not None:
        keys, query_pe, key_pe = (x.to(queries.dtype) for x in (keys, query_pe, key_pe))
    tokens = (queries, keys, query_pe, key_pe)
    _check_tokens(*tokens, key_lengths)
    _check_weights(queries, weights, norm_weight, norm_bias, num_heads)
    tensors: list[Any] = [*tokens, *autocast(*weights), norm_weight, norm_bias]
    settings = (key_lengths, num_heads, eps, needs_gradient(*tensors))
    return _forward(*tensors, *settings, backend or "")[0]


def _check_tokens(
    queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, key_lengths: Tensor | None
) -> None:
    check_shape("queries", queries, ("P", "Tq", "C"))
    expressions, _, channels = queries.shape
    require(expressions > 0, "queries", "no expressions", "at least one")
    check_shape("keys", keys, (expressions, "Tk", channels))
    for name, tensor in (("queries", queries), ("keys", keys)):
        require(tensor.shape[1] > 0, name, "no tokens", "at least one per expression")
    for name, pe, tensor in (("query_pe", query_pe, queries), ("key_pe", key_pe, keys)):
        check_shape(name, pe, ("P", *tensor.shape[1:]))
        fits = pe.shape[0] in (1, expressions)
        require(fits, name, f"{pe.shape[0]} expressions", f"{expressions} or 1")
    tokens = {"queries": queries, "keys": keys, "query_pe": query_pe, "key_pe": key_pe}
    check_same_device(**tokens, key_lengths=key_lengths)
    check_same_dtype(**tokens)
    if key_lengths is not None:
        check_shape("key_lengths", key_lengths, (expressions,))
        require(key_lengths.dtype == torch.int64, "key_lengths", key_lengths.dtype, "torch.int64")
        check_range("key_lengths", key_lengths, 1, keys.shape[1])


def _check_weights(
    queries: Tensor,
    weights: AttentionWeights,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_heads: int,
) -> None:
    channels = queries.shape[2]
    check_shape("weights.q_weight", weights.q_weight, ("internal width", channels))
    internal = weights.q_weight.shape[0]
    divides = num_heads > 0 and internal % num_heads == 0
    require(divides, "num_heads", num_heads, f"a divisor of the internal width {internal}")
    inward = ((internal, channels), (internal,))
    shapes = (*inward, *inward, *inward, (channels, internal), (channels,))
    named = {f"weights.{name}": tensor for name, tensor in weights._asdict().items()}
    for (name, tensor), shape in zip(named.items(), shapes, strict=True):
        check_shape(name, tensor, shape)
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(name, tensor, (channels,))
        require(tensor.is_floating_point(), name, tensor.dtype, "a floating point dtype")
    check_same_device(queries=queries, norm_weight=norm_weight, norm_bias=norm_bias, **named)
    if autocast_dtype(queries.device) is not None:
        check_same_dtype(**named)
    else:
        check_same_dtype(queries=queries, **named)
