"""Hierarchical dense attention with half of the projection absorbed into the text, and its explicit gradient.

With W = [W1 W2], `W [F ; A T] + b = W1 F + A (T W2^T) + b`, so neither the concatenation nor the attended text is built. The part
without text is computed once per image. The attention over the words is mixed over the levels before it is multiplied with the
absorbed text. Sums over the expressions of an image are matrix products, which are deterministic.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.chunking import chunks
from refsam_kernels.core.index_checks import valid_positions
from refsam_kernels.dense_attention.inputs import Inputs


def forward(inputs: Inputs) -> Tensor:
    """Like `reference.forward`: products in the dtype of the features, softmax in float32 at least."""
    features, text, lengths, image_index, weight, bias, scale, level_weights = inputs
    text, valid = _without_padding(text, lengths)
    own, attended = weight.chunk(2, dim=1)
    bias = bias * level_weights.sum().to(bias.dtype)
    per_image = F.linear(_mix(features, level_weights), own, bias)
    absorbed = F.linear(text, attended)
    dense = features.new_empty(len(text), *features.shape[2:])
    for part in _slices(text, features):
        _, attention = _attend(features, text[part], valid[part], image_index[part], scale)
        mixture = _mix(attention, level_weights).to(text.dtype)
        images = _of_expressions(per_image, image_index[part])
        torch.baddbmm(images, mixture.mT, absorbed[part], out=dense[part])
    return dense


def backward(
    inputs: Inputs, outputs: None, grads: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Like `reference.backward`; the attention is computed again."""
    features, text, lengths, image_index, weight, bias, scale, level_weights = inputs
    (grad,) = grads
    text, valid = _without_padding(text, lengths)
    shares = level_weights.to(torch.promote_types(text.dtype, torch.float32))
    own, attended = weight.chunk(2, dim=1)
    absorbed = F.linear(text, attended)
    grad_image = _sum_of_expressions(grad, image_index, features.shape[1])
    grad_mixed = grad_image @ own
    grad_features = grad_mixed * shares.view(-1, 1, 1, 1) if needs[0] else grad
    grad_bias = grad.sum(dim=(0, 1), dtype=shares.dtype)
    grad_shares = torch.stack([(level * grad_mixed).sum(dtype=shares.dtype) for level in features])
    grad_shares += grad_bias @ bias.to(shares.dtype)
    grad_text, grad_absorbed = torch.empty_like(text), torch.empty_like(text)
    grad_scale = shares.new_zeros(())
    for part in _slices(text, features):
        index = image_index[part]
        similarity, attention = _attend(features, text[part], valid[part], index, scale)
        weighted = attention * (absorbed[part] @ grad[part].mT)
        grad_logits = weighted - attention * weighted.sum(dim=2, keepdim=True)
        grad_logits *= shares.view(-1, 1, 1, 1)
        grad_scale += (grad_logits * similarity).sum()
        grad_shares += weighted.sum(dim=(1, 2, 3))
        grad_absorbed[part] = _mix(attention, shares).to(grad.dtype) @ grad[part]
        grad_similarity = (grad_logits * scale).to(text.dtype)
        grad_text[part] = _text_gradient(grad_similarity, features, index)
        if needs[0]:
            _add_features_gradient(grad_features, grad_similarity, text[part], index)
    grad_own = grad_image.flatten(0, 1).T @ _mix(features, shares).flatten(0, 1)
    grad_attended = grad_absorbed.flatten(0, 1).T @ text.flatten(0, 1)
    return (
        grad_features,
        grad_text + grad_absorbed @ attended,
        torch.cat([grad_own, grad_attended], dim=1),
        grad_bias * shares.sum(),
        grad_scale,
        grad_shares,
    )


def _without_padding(text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The text with zeros for padding, and which words are valid, (P, T)."""
    valid = valid_positions(lengths, text.shape[1])
    return torch.where(valid.unsqueeze(-1), text, 0.0), valid


def _slices(text: Tensor, features: Tensor) -> Iterator[slice]:
    """Slices of expressions, sized by their intermediate results: attention, and pixels too if there are several images."""
    _, images, pixels, channels = features.shape
    each = text.shape[1] if images == 1 else channels
    return chunks(len(text), each * pixels, text.device)


def _attend(
    features: Tensor, text: Tensor, valid: Tensor, image_index: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Similarity and attention, (L, P, T, N) in float32 at least: pixels last, so that the softmax runs over whole vectors."""
    levels = [_similarity(text, level, image_index) for level in features]
    similarity = torch.stack(levels).to(torch.promote_types(text.dtype, torch.float32))
    padding = torch.where(valid, 0.0, float("-inf")).to(similarity.dtype).unsqueeze(-1)
    return similarity, torch.addcmul(padding, similarity, scale.to(padding.dtype)).softmax(dim=2)


def _similarity(text: Tensor, level: Tensor, image_index: Tensor) -> Tensor:
    """(P, T, N) of text (P, T, C) and pixels (B, N, C): one product, which reads the pixels once, where there is one image."""
    if len(level) == 1:
        return (text.flatten(0, 1) @ level[0].T).unflatten(0, text.shape[:2])
    return text @ _of_expressions(level, image_index).mT


def _mix(features: Tensor, level_weights: Tensor) -> Tensor:
    """Sum over the levels, the first dimension; a scalar factor is not rounded to the features' dtype."""
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


def _text_gradient(grad_similarity: Tensor, features: Tensor, image_index: Tensor) -> Tensor:
    """(P, T, C): through the similarity with the pixels of every level."""
    of_levels = [
        of_level @ _of_expressions(level, image_index)
        for of_level, level in zip(grad_similarity, features, strict=True)
    ]
    return torch.stack(of_levels).sum(dim=0)


def _add_features_gradient(
    grad_features: Tensor, grad_similarity: Tensor, text: Tensor, image_index: Tensor
) -> None:
    """Adds to (L, B, N, C) the gradient through the similarity with the text of these expressions."""
    for out, of_level in zip(grad_features, grad_similarity, strict=True):
        out += _sum_of_expressions(of_level.mT @ text, image_index, len(out))
