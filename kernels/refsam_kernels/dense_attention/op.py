"""Hierarchical dense attention: every pixel attends to the words, at every level, for every expression."""

from typing import Any

import torch
from torch import Tensor

from refsam_kernels.core.checks import (
    autocast,
    check_same_device,
    check_same_dtype,
    check_shape,
    require,
)
from refsam_kernels.core.flops import Product, counts
from refsam_kernels.core.index_checks import check_range
from refsam_kernels.core.registration import Operator
from refsam_kernels.dense_attention.inputs import Inputs

operator = Operator("dense_attention", Inputs)


@operator.forward
def _forward(inputs: Inputs) -> Tensor:
    return inputs.features.new_empty(inputs.text.shape[0], *inputs.features.shape[2:])


operator.differentiate({"grad": "out"}, frozen=["lengths", "image_index"], as_tuple=True)


@counts(operator)
def _products(inputs: Any) -> list[Product]:
    """The features' half of the projection once per frame; words with features, and their mixtures, per expression."""
    (levels, frames, tokens, channels), (expressions, words, _) = inputs.features, inputs.text
    projection = 2 * levels * frames * tokens * channels * channels
    return [
        (projection, "weight"),
        (4 * levels * expressions * tokens * words * channels, None),
    ]


def dense_attention(
    features: Tensor,
    text: Tensor,
    lengths: Tensor,
    image_index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    level_weights: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Hierarchical dense attention: the sum over levels of `level_weight * (W [F ; softmax(F T^T * scale) T] + b)`.

    For all expressions at once. Follows arXiv 2307.00997; see this folder's README.

    Args:
        features: (L, B, N, C) unit vectors, floating point: L levels of B images with N pixels.
        text: (P, T, C) unit vectors of P expressions: of the whole expression, then of its words, padded.
        lengths: (P,) int64 in 1..T, valid entries of `text`; later entries change nothing, NaN included.
        image_index: (P,) int64 in 0..B-1, the image of each expression.
        weight, bias: (C, 2C) and (C,), the projection W; the features' channels come first.
        scale: () floating point, factor of the similarities.
        level_weights: (L,) floating point, the levels' shares; nothing here makes them convex.
        backend: name of the backend; None lets the library choose.

    Returns:
        (P, N, C) in the dtype of the features, under autocast in autocast's.

    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the requested backend cannot run.
    """
    features, text, weight, bias = autocast(features, text, weight, bias)
    inputs = Inputs(features, text, lengths, image_index, weight, bias, scale, level_weights)
    _check(inputs)
    return _forward(*inputs, backend or "")


def _check(inputs: Inputs) -> None:
    features, text, lengths, image_index, weight, bias, scale, level_weights = inputs
    check_shape("features", features, ("L", "B", "N", "C"))
    levels, images, pixels, channels = features.shape
    shape = f"shape {tuple(features.shape)}"
    require(min(levels, images, pixels, channels) > 0, "features", shape, "no empty dimension")
    check_shape("text", text, ("P", "T", channels))
    expressions, words = text.shape[:2]
    require(expressions > 0, "text", "no expressions", "at least one")
    require(words > 0, "text", "no words", "at least one per expression")
    check_shape("lengths", lengths, (expressions,))
    check_shape("image_index", image_index, (expressions,))
    check_shape("weight", weight, (channels, 2 * channels))
    check_shape("bias", bias, (channels,))
    check_shape("scale", scale, ())
    check_shape("level_weights", level_weights, (levels,))
    check_same_device(**inputs._asdict())
    check_same_dtype(features=features, text=text, weight=weight, bias=bias)
    for name, tensor in (("scale", scale), ("level_weights", level_weights)):
        require(tensor.is_floating_point(), name, tensor.dtype, "a floating point dtype")
    for name, tensor in (("lengths", lengths), ("image_index", image_index)):
        require(tensor.dtype == torch.int64, name, tensor.dtype, "torch.int64")
    check_range("lengths", lengths, 1, words)
    check_range("image_index", image_index, 0, images - 1)
