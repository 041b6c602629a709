"""Hierarchical dense attention with the text folded into the projection, and its explicit gradient.

With W = [W1 W2], `W [F ; A T] + b = W1 F + A (T W2^T) + b`: neither the concatenation nor the attended text is built. The part
that does not depend on the text is computed once per image, the attention over the words is mixed over the levels before it
meets the folded text, and sums over the expressions of an image are matrix products, which are deterministic.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.values import valid_positions


def forward(
    features: Tensor,
    text: Tensor,
    lengths: Tensor,
    image_index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    level_weights: Tensor,
) -> Tensor:
    """Like `reference.forward`: products in the dtype of the features, softmax in float32 at least."""
    text, attention, _ = _attend(features, text, lengths, image_index, scale)
    mixture = torch.tensordot(level_weights.to(attention.dtype), attention, dims=1).to(text.dtype)
    own, attended = weight.chunk(2, dim=1)
    bias = bias * level_weights.sum().to(bias.dtype)
    per_image = F.linear(_mix(features, level_weights), own, bias)
    return torch.baddbmm(_of_expressions(per_image, image_index), mixture, F.linear(text, attended))


def backward(
    grad: Tensor,
    features: Tensor,
    text: Tensor,
    lengths: Tensor,
    image_index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    level_weights: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Like `reference.backward`; the attention is computed again."""
    text, attention, similarity = _attend(features, text, lengths, image_index, scale)
    shares = level_weights.to(attention.dtype)
    own, attended = weight.chunk(2, dim=1)
    grad_image = _sum_of_expressions(grad, image_index, features.shape[1])
    grad_mixed = grad_image @ own
    grad_folded = torch.tensordot(shares, attention, dims=1).to(grad.dtype).mT @ grad

    weighted = attention * (grad @ F.linear(text, attended).mT)
    grad_logits = weighted - attention * weighted.sum(dim=-1, keepdim=True)
    grad_logits = grad_logits * shares.view(-1, 1, 1, 1)
    grad_similarity = (grad_logits * scale).to(text.dtype)
    grad_features = grad
    if needs[0]:
        grad_features = _features_gradient(grad_similarity, grad_mixed, text, image_index, shares)
    grad_text = _text_gradient(grad_similarity, features, image_index) + grad_folded @ attended

    grad_own = grad_image.flatten(0, 1).T @ _mix(features, shares).flatten(0, 1)
    grad_attended = grad_folded.flatten(0, 1).T @ text.flatten(0, 1)
    grad_bias = grad.sum(dim=(0, 1), dtype=shares.dtype)
    grad_shares = weighted.sum(dim=(1, 2, 3)) + grad_bias @ bias.to(shares.dtype)
    grad_shares += torch.stack([(level * grad_mixed).sum(dtype=shares.dtype) for level in features])
    gradients = (
        grad_features,
        grad_text,
        torch.cat([grad_own, grad_attended], dim=1),
        (grad_bias * shares.sum()).to(bias.dtype),
        (grad_logits * similarity).sum().to(scale.dtype),
        grad_shares.to(level_weights.dtype),
    )
    return tuple(
        gradient if need else grad.new_empty(0)
        for gradient, need in zip(gradients, needs, strict=True)
    )


def _attend(
    features: Tensor, text: Tensor, lengths: Tensor, image_index: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Text (P, T, C) with zeros for padding; attention and similarity (L, P, N, T), in float32 at least."""
    valid = valid_positions(lengths, text.shape[1])
    text = torch.where(valid.unsqueeze(-1), text, 0.0)
    similarity = torch.stack([_of_expressions(level, image_index) @ text.mT for level in features])
    similarity = similarity.to(torch.promote_types(text.dtype, torch.float32))
    logits = torch.where(valid.unsqueeze(1), similarity * scale, float("-inf"))
    return text, logits.softmax(dim=-1), similarity


def _mix(features: Tensor, level_weights: Tensor) -> Tensor:
    """Sum over the levels of (L, B, N, C); a scalar factor is not rounded to the features' dtype."""
    mixed = features[0] * level_weights[0]
    for level, level_weight in zip(features[1:], level_weights[1:], strict=True):
        mixed = mixed + level * level_weight
    return mixed


def _of_expressions(per_image: Tensor, image_index: Tensor) -> Tensor:
    """(B, N, C) of the images -> (P, N, C) of the expressions; nothing is copied where there is only one image."""
    if per_image.shape[0] == 1:
        return per_image.expand(len(image_index), -1, -1)
    return per_image.index_select(0, image_index)


def _sum_of_expressions(per_expression: Tensor, image_index: Tensor, images: int) -> Tensor:
    """The transpose of `_of_expressions`: (P, N, C) -> (B, N, C), by a matrix product, which is deterministic."""
    belongs = torch.arange(images, device=image_index.device).unsqueeze(1) == image_index
    return (belongs.to(per_expression.dtype) @ per_expression.flatten(1)).unflatten(
        1, per_expression.shape[1:]
    )


def _features_gradient(
    grad_similarity: Tensor,
    grad_mixed: Tensor,
    text: Tensor,
    image_index: Tensor,
    level_weights: Tensor,
) -> Tensor:
    """(L, B, N, C): through the similarity with the text, and through the mixture of the levels."""
    gradient = grad_mixed.new_empty(len(level_weights), *grad_mixed.shape)
    for out, of_level, level_weight in zip(gradient, grad_similarity, level_weights, strict=True):
        pulled = _sum_of_expressions(of_level @ text, image_index, len(grad_mixed))
        torch.add(pulled, grad_mixed * level_weight, out=out)
    return gradient


def _text_gradient(grad_similarity: Tensor, features: Tensor, image_index: Tensor) -> Tensor:
    """(P, T, C): through the similarity with the pixels of every level."""
    of_levels = [
        of_level.mT @ _of_expressions(level, image_index)
        for of_level, level in zip(grad_similarity, features, strict=True)
    ]
    return torch.stack(of_levels).sum(dim=0)
