"""Mask upscaling as two matrix products over channels-last pixels, a few expressions at a time.

A transposed convolution with kernel 2 and stride 2 has no overlap: every input pixel becomes four output pixels by a matrix
product, so pixels stay rows and channels columns until the end. Only the M masks, not the C/8 channels, are shuffled into place.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.chunking import chunks
from refsam_kernels.core.gradients import gradients_by_vjp
from refsam_kernels.mask_upscale.inputs import Inputs
from refsam_kernels.packed_linear import can_prepack

# gelu(x weight^T + bias + addend), the addend being None or (P or 1, pixels, out).
ProductGelu = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# Indices of the convolutions' weights among the tensors, each followed by its bias.
CONV1, CONV2 = 2, 6


def forward(inputs: Inputs) -> Tensor:
    """Like `reference.forward`: products in the dtype of the features, LayerNorm in float32 at least."""
    *tensors, eps = inputs
    packed = _pack(tensors)
    product = _fused_product if can_prepack(inputs.features) else _product_gelu
    formula = partial(_formula, eps=eps, product_gelu=product)
    parts = [formula(*_take(packed, part)) for part in _slices(packed)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def backward(
    inputs: Inputs, outputs: None, grads: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Like `reference.backward`; the upscaled features are computed again."""
    *tensors, eps = inputs
    packed, formula = _pack(tensors), partial(_formula, eps=eps, product_gelu=_product_gelu)
    parts = [
        gradients_by_vjp(formula, _take(packed, part), needs, (grads[0][part],))
        for part in _slices(packed)
    ]
    gradients = [*map(_joined, zip(*parts, strict=True), _per_expression(packed))]
    for index in (CONV1, CONV2):
        weight, bias = gradients[index : index + 2]
        if weight is not None:
            gradients[index] = _unpack(weight)
        if bias is not None:
            gradients[index + 1] = bias.view(4, -1).sum(dim=0)
    return gradients


def _per_expression(tensors: Sequence[Tensor | None]) -> list[bool]:
    """Whether each tensor has a part per expression: features, hypernetworks' outputs and additions that are not shared."""
    features = tensors[0]
    assert features is not None
    shared = [x is None or len(x) != len(features) for x in tensors[-2:]]
    return [True, True] + [False] * 6 + [not x for x in shared]


def _take(tensors: Sequence[Any], part: slice) -> list[Any]:
    """The tensors for the expressions in the slice."""
    split = _per_expression(tensors)
    return [x[part] if is_split else x for x, is_split in zip(tensors, split, strict=True)]


def _joined(parts: Sequence[Tensor | None], is_split: bool) -> Tensor | None:
    """The gradient of all expressions from those of the slices; of what they share, the sum in their order, float32 at least."""
    found = [part for part in parts if part is not None]
    if len(found) < 2:
        return parts[0]
    if is_split:
        return torch.cat(found)
    wide = torch.promote_types(found[0].dtype, torch.float32)
    return sum((part.to(wide) for part in found), found[0].new_zeros((), dtype=wide))


def _pack(tensors: Sequence[Any]) -> list[Any]:
    """The convolutions' weights as (2 * 2 * out, in), their biases as (2 * 2 * out,), the others as they are."""
    packed = list(tensors)
    for index in (CONV1, CONV2):
        packed[index] = tensors[index].permute(2, 3, 1, 0).flatten(0, 2).contiguous()
        packed[index + 1] = tensors[index + 1].repeat(4)
    return packed


def _unpack(weight: Tensor) -> Tensor:
    """(2 * 2 * out, in) -> (in, out, 2, 2), as nn.ConvTranspose2d holds it."""
    return weight.unflatten(0, (2, 2, -1)).permute(3, 2, 0, 1)


def _slices(tensors: Sequence[Tensor]) -> list[slice]:
    features, hyper = tensors[:2]
    expressions, height, width, _ = features.shape
    each = 16 * height * width * hyper.shape[2]
    return list(chunks(expressions, each, features.device)) or [slice(0)]


def _formula(
    features: Tensor,
    hyper: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    feat_s1: Tensor | None,
    feat_s0: Tensor | None,
    eps: float,
    product_gelu: ProductGelu,
) -> Tensor:
    expressions, height, width, _ = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    x = _quadruple(F.linear(features.flatten(1, 2), conv1_weight, conv1_bias))
    if feat_s1 is not None:
        x = x + _by_pixel(feat_s1, height, width, (2,)).flatten(1, 2)
    x = F.layer_norm(x.to(dtype), x.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    added = None if feat_s0 is None else _by_pixel(feat_s0, height, width, (2, 2)).flatten(2)
    x = _quadruple(product_gelu(F.gelu(x).to(features.dtype), conv2_weight, conv2_bias, added))
    masks = x @ hyper.mT  # (P, pixels, M): per pixel of the features 2 x 2 blocks of 2 x 2
    masks = masks.unflatten(1, (height, width, 2, 2, 2, 2)).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return masks.reshape(expressions, hyper.shape[1], 4 * height, 4 * width)


def _quadruple(columns: Tensor) -> Tensor:
    """A transposed convolution, kernel 2, stride 2, from its product: (P, n, 4 out) -> (P, 4n, out), a pixel's 2 x 2 together."""
    return columns.unflatten(2, (4, -1)).flatten(1, 2)


def _by_pixel(feature: Tensor, height: int, width: int, steps: tuple[int, ...]) -> Tensor:
    """Features of a higher resolution, pixels as `_quadruple` orders them.

    (P, C, H, W) to (P, h w, 4, C) for one step of 2, to (P, 4 h w, 4, C) for two.
    """
    split = feature.unflatten(3, (width, *steps)).unflatten(2, (height, *steps))
    count = len(steps) + 1  # dimensions of an axis
    pairs = [axis for step in range(count) for axis in (2 + step, 2 + count + step)]
    return split.permute(0, *pairs, 1).flatten(-3, -2).flatten(1, -3)


def _product_gelu(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None) -> Tensor:
    """gelu(x weight^T + bias + added), differentiable."""
    product = F.linear(x, weight, bias)
    return F.gelu(product if added is None else product + added)


def _fused_product(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None) -> Tensor:
    """The same by oneDNN, which writes the result once; torch.compile calls it for this, torch has no public function."""
    if added is not None:
        return F.gelu(F.linear(x, weight, bias).add_(added))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
