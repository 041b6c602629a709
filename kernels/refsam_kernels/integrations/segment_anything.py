"""segment-anything's `Sam` and `ImageEncoderViT`: which methods are replaced, and by what."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam_kernels.integrations.replacement import (
    Attend,
    Replacement,
    attention_reasons,
    encoder_of,
    perceptron_replacement,
    refuse,
    structure_reasons,
)

BLOCK_MEMBERS = {"norm1", "attn", "norm2", "mlp"}


def replacements(model: nn.Module) -> list[Replacement]:
    """The replacements for a `Sam` or `ImageEncoderViT`. Raises `ValueError` if the model is modified inside."""
    path, encoder = encoder_of(model, "image_encoder", "ImageEncoderViT")
    blocks = [(f"{path}.blocks.{i}", block) for i, block in enumerate(encoder.blocks)]
    norms = [
        (f"{path}.neck.{i}", module)
        for i, module in enumerate(encoder.neck)
        if type(module).__name__ == "LayerNorm2d"
    ]
    refuse([reason for where, block in blocks for reason in _block_reasons(where, block)])
    found = [item for where, block in blocks for item in _block_replacements(where, block)]
    return found + [
        Replacement(where, norm, _layer_norm, parameters=("x",)) for where, norm in norms
    ]


def _block_reasons(path: str, block: Any) -> Iterator[str]:
    reasons = list(structure_reasons(path, block, {"Block"}, BLOCK_MEMBERS))
    yield from reasons or attention_reasons(f"{path}.attn", block.attn, {"Attention"})


def _block_replacements(path: str, block: Any) -> Iterator[Replacement]:
    yield Replacement(path, block, _block, parameters=("x",))
    attend = Attend(num_heads=block.attn.num_heads, window_size=block.window_size)
    yield Replacement(f"{path}.attn", block.attn, attend, parameters=("x",))
    yield from perceptron_replacement(f"{path}.mlp", block.mlp)


def _block(block: Any, x: Tensor) -> Tensor:
    """`Block.forward` on (B, h, w, D), its attention being handed the grid, not windows."""
    x = x + block.attn(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def _layer_norm(norm: Any, x: Tensor) -> Tensor:
    """`LayerNorm2d.forward` of the neck on (B, C, h, w), whose channels lie side by side there."""
    # As there: under autocast the convolution's result is lower than the parameters.
    channels_last = x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, norm.weight.dtype))
    normed = F.layer_norm(channels_last, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return normed.permute(0, 3, 1, 2)
