"""segment-anything's `Sam` and `ImageEncoderViT`: which methods are replaced, and by what."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from refsam_kernels.integrations.replacement import (
    Replacement,
    attend,
    attention_reasons,
    encoder_of,
    refuse,
    structure_reasons,
)

BLOCK_MEMBERS = {"norm1", "attn", "norm2", "mlp"}


def replacements(model: nn.Module) -> list[Replacement]:
    """What to replace in a `Sam` or `ImageEncoderViT`. Raises `ValueError` where the model is another one inside."""
    path, encoder = encoder_of(model, "image_encoder", "ImageEncoderViT")
    blocks = [(f"{path}.blocks.{i}", block) for i, block in enumerate(encoder.blocks)]
    refuse([reason for where, block in blocks for reason in _block_reasons(where, block)])
    return [item for where, block in blocks for item in _block_replacements(where, block)]


def _block_reasons(path: str, block: Any) -> Iterator[str]:
    reasons = list(structure_reasons(path, block, {"Block"}, BLOCK_MEMBERS))
    yield from reasons or attention_reasons(f"{path}.attn", block.attn, {"Attention"})


def _block_replacements(path: str, block: Any) -> Iterator[Replacement]:
    yield Replacement(path, block, _block)
    windowed = partial(_attention, window_size=block.window_size)
    yield Replacement(f"{path}.attn", block.attn, windowed)


def _block(block: Any, x: Tensor) -> Tensor:
    """`Block.forward` on (B, h, w, D), its attention being handed the grid, not windows."""
    x = x + block.attn(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def _attention(attention: Any, x: Tensor, *, window_size: int) -> Tensor:
    return attend(attention, x, num_heads=attention.num_heads, window_size=window_size)
