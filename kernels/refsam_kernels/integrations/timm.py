"""timm's `VisionTransformerSAM`: which methods are replaced, and by what.

Its neck already normalises channels where they lie side by side: there is nothing to replace.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from refsam_kernels.integrations.replacement import (
    Attend,
    Replacement,
    qkv_reasons,
    refuse,
    structure_reasons,
)

BLOCK_MEMBERS = {
    "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"
}  # fmt: skip
ATTENTION_MEMBERS = {
    "qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "rel_pos_h", "rel_pos_w"
}  # fmt: skip


def replacements(model: Any) -> list[Replacement]:
    """The replacements for a `VisionTransformerSAM`. Raises `ValueError` if it is modified inside."""
    blocks = [(f"model.blocks.{i}", block) for i, block in enumerate(model.blocks)]
    refuse([reason for where, block in blocks for reason in _block_reasons(where, block)])
    return [item for where, block in blocks for item in _block_replacements(where, block)]


def _block_reasons(path: str, block: Any) -> Iterator[str]:
    reasons = list(structure_reasons(path, block, {"Block"}, BLOCK_MEMBERS))
    if reasons:
        yield from reasons
        return
    attention, path = block.attn, f"{path}.attn"
    if not attention.use_rel_pos:
        yield f"{path}.use_rel_pos: got False, wanted True"
        return
    yield from structure_reasons(path, attention, {"Attention"}, ATTENTION_MEMBERS)
    yield from qkv_reasons(path, attention)
    for name in ("q_norm", "k_norm"):
        if type(getattr(attention, name)) is not nn.Identity:
            yield f"{path}.{name}: got a {type(getattr(attention, name)).__name__}, wanted qk_norm=False"
    if attention.attn_drop.p:
        yield f"{path}.attn_drop: got {attention.attn_drop.p}, wanted 0: attention's weights are never made"


def _block_replacements(path: str, block: Any) -> Iterator[Replacement]:
    attend = Attend(num_heads=block.attn.num_heads, window_size=block.window_size)
    yield Replacement(path, block, _block, parameters=("x",))
    yield Replacement(f"{path}.attn", block.attn, partial(_attention, attend), parameters=("x",))


def _block(block: Any, x: Tensor) -> Tensor:
    """`Block.forward` on (B, h, w, D), its attention being handed the grid, not windows."""
    attended = block.ls1(block.attn(block.norm1(x)))
    if block.training and block.window_size and type(block.drop_path1) is not nn.Identity:
        x = x + attended * _shares_of_windows(block, x)
    else:
        x = x + block.drop_path1(attended)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _shares_of_windows(block: Any, x: Tensor) -> Tensor:
    """Factors (B, h, w, 1) of `drop_path1` for each token; timm drops whole windows, which are its images there."""
    images, height, width, _ = x.shape
    size = block.window_size
    rows, columns = -(-height // size), -(-width // size)
    shares = block.drop_path1(x.new_ones(images * rows * columns, 1, 1, 1))
    shares = shares.view(images, rows, columns, 1)
    return shares.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :height, :width]


def _attention(attend: Attend, attention: Any, x: Tensor) -> Tensor:
    """`Attention.forward`; one operator between its modules."""
    return attention.proj_drop(attend(attention, x))
