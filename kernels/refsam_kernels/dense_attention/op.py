"""Hierarchical dense attention: every pixel looks at the words, at every level, for every expression."""

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
from refsam_kernels.core.index_checks import check_range
from refsam_kernels.core.registration import FlatOperator, drop_skipped, empty_gradients

operator = FlatOperator("dense_attention")


@operator.forward
def _forward(
    features: Tensor,
    text: Tensor,
    lengths: Tensor,
    image_index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    level_weights: Tensor,
    backend: str,
) -> Tensor:
    return features.new_empty(text.shape[0], features.shape[2], features.shape[3])


@operator.backward
def _backward(
    grad: Tensor,
    features: Tensor,
    text: Tensor,
    lengths: Tensor,
    image_index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    level_weights: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients((features, text, weight, bias, scale, level_weights), needs)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    needs = [*wanted[:2], *wanted[4:8]]
    gradients = drop_skipped(_backward(grad, *ctx.saved_tensors, needs, ctx.backend), needs)
    return *gradients[:2], None, None, *gradients[2:], None


operator.differentiate(_save, _gradients)


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
    """Sum over levels of level_weight * (W [F ; softmax(F T^T * scale) T] + b), for all expressions at once.

    Follows hierarchical dense attention of arXiv 2307.00997; see this folder's README.

    Args:
        features: (L, B, N, C) unit vectors, floating point: L levels of B images with N pixels.
        text: (P, T, C) unit vectors: the sentence and the words of P expressions, padded.
        lengths: (P,) int64 in 1..T; entries of `text` from there on change nothing, NaN included.
        image_index: (P,) int64 in 0..B-1, the image of each expression.
        weight, bias: (C, 2C) and (C,), the projection W; the features' channels come first.
        scale: () floating point, factor of the similarities.
        level_weights: (L,) floating point, the levels' shares; nothing here makes them convex.
        backend: name of the backend, None for the best that can run.

    Returns:
        (P, N, C) in the dtype of the features, under autocast in autocast's.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; `BackendError` if the backend cannot run.
    """
    features, text, weight, bias = autocast(features, text, weight, bias)
    _check(features, text, lengths, image_index, weight, bias, scale, level_weights)
    return _forward(
        features, text, lengths, image_index, weight, bias, scale, level_weights, backend or ""
    )


def _check(
    features: Tensor,
    text: Tensor,
    lengths: Tensor,
    image_index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    level_weights: Tensor,
) -> None:
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
    check_same_device(features=features, text=text, lengths=lengths, image_index=image_index)
    check_same_device(features=features, weight=weight, bias=bias)
    check_same_device(features=features, scale=scale, level_weights=level_weights)
    check_same_dtype(features=features, text=text, weight=weight, bias=bias)
    for name, tensor in (("scale", scale), ("level_weights", level_weights)):
        require(tensor.is_floating_point(), name, tensor.dtype, "a floating point dtype")
    for name, tensor in (("lengths", lengths), ("image_index", image_index)):
        require(tensor.dtype == torch.int64, name, tensor.dtype, "torch.int64")
    check_range("lengths", lengths, 1, words)
    check_range("image_index", image_index, 0, images - 1)
