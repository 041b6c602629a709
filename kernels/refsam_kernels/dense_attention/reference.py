"""Hierarchical dense attention as the paper writes it (arXiv 2307.00997, section on dense attention)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.gradients import derived_backward
from refsam_kernels.core.index_checks import valid_positions
from refsam_kernels.dense_attention.inputs import Inputs


def forward(inputs: Inputs) -> Tensor:
    """Sum over levels of level_weight * (W [F ; softmax(F T^T * scale) T] + b), computed in float32 at least.

    features (L, B, N, C), text (P, T, C), lengths (P,), image_index (P,), weight (C, 2C), bias (C,), scale (),
    level_weights (L,) -> (P, N, C) in the dtype of the features.
    """
    features, text, lengths, image_index, weight, bias, scale, level_weights = inputs
    dtype = torch.promote_types(features.dtype, torch.float32)
    valid = valid_positions(lengths, text.shape[1])
    text = torch.where(valid.unsqueeze(-1), text, 0.0).to(dtype)
    dense = text.new_zeros(())
    for level, level_weight in zip(features.to(dtype), level_weights, strict=True):
        pixels = level[image_index]
        logits = pixels @ text.mT * scale
        attention = torch.where(valid.unsqueeze(1), logits, float("-inf")).softmax(dim=-1)
        both = torch.cat([pixels, attention @ text], dim=-1)
        dense = dense + level_weight * F.linear(both, weight.to(dtype), bias.to(dtype))
    return dense.to(features.dtype)


backward = derived_backward(forward, "features", "text", "weight", "bias", "scale", "level_weights")
