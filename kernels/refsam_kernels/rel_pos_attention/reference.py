"""The formula of `rel_pos_attention` in segment-anything's order of operations, for clarity only.

Bit-equal to segment-anything's `Attention` between `window_partition` and `window_unpartition`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.gradients import derived_backward
from refsam_kernels.rel_pos_attention.inputs import Inputs, Outputs


def forward(inputs: Inputs) -> Outputs:
    """Output (B, h, w, D) and the logarithm of each softmax's sum (B, heads, h, w)."""
    qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pad_mode = inputs
    h, w = qkv.shape[1:3]
    height, width = (window_size, window_size) if window_size else (h, w)
    windows, rows, columns = partition(pad(qkv, qkv_bias, height, width), height, width)
    q, k, v = split_heads(windows, num_heads)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = add_rel_pos(logits, q, rel_pos_h, rel_pos_w, height, width)
    if pad_mode == "mask":
        logits = mask_padding(logits, qkv, num_heads, height, width)
    attended = logits.softmax(-1) @ v  # (windows * heads, tokens, head_dim)
    out = join_heads(attended, num_heads, height, width)
    statistics = torch.promote_types(qkv.dtype, torch.float32)
    log_sum_exp = logits.to(statistics).logsumexp(-1, keepdim=True)
    log_sum_exp = join_heads(log_sum_exp, num_heads, height, width)
    out, log_sum_exp = (unpartition(t, rows, columns)[:, :h, :w] for t in (out, log_sum_exp))
    return Outputs(out.contiguous(), log_sum_exp.permute(0, 3, 1, 2).contiguous())


backward = derived_backward(forward, *Inputs._fields[:4])


def pad(tokens: Tensor, value: Tensor | None, height: int, width: int) -> Tensor:
    """Fills a grid (B, h, w, C) at the bottom and right up to whole windows, with (C,) or zeros."""
    _, h, w, _ = tokens.shape
    if h % height == 0 and w % width == 0:
        return tokens
    bottom, right = -h % height, -w % width
    padded = F.pad(tokens, (0, 0, 0, right, 0, bottom))
    if value is None:
        return padded
    is_real = F.pad(torch.ones_like(tokens[..., :1]), (0, 0, 0, right, 0, bottom))
    return torch.where(is_real > 0, padded, value)


def mask_padding(logits: Tensor, qkv: Tensor, num_heads: int, height: int, width: int) -> Tensor:
    """Logits (windows * heads, tokens, tokens), minus infinity where the key is padding."""
    is_real = pad(torch.ones_like(qkv[..., :1]), None, height, width)
    is_real = partition(is_real, height, width)[0].flatten(1) > 0  # (windows, tokens)
    is_real = is_real.repeat_interleave(num_heads, 0)[:, None]
    return logits.masked_fill(~is_real, float("-inf"))


def partition(tokens: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
    """Cuts a grid (B, H, W, C) into (windows, height, width, C); rows and columns of windows."""
    rows, columns = tokens.shape[1] // height, tokens.shape[2] // width
    windows = tokens.unflatten(2, (columns, width)).unflatten(1, (rows, height))
    return windows.transpose(2, 3).flatten(0, 2), rows, columns


def unpartition(windows: Tensor, rows: int, columns: int) -> Tensor:
    """Joins (windows, height, width, C) to a grid (B, H, W, C)."""
    grid = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return grid.flatten(3, 4).flatten(1, 2)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(windows, height, width, 3*D) to q, k, v, each (windows * heads, tokens, head_dim)."""
    split = qkv.flatten(1, 2).unflatten(-1, (3, num_heads, -1))
    return split.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)


def join_heads(tokens: Tensor, num_heads: int, height: int, width: int) -> Tensor:
    """(windows * heads, tokens, head_dim) to (windows, height, width, D)."""
    split = tokens.unflatten(1, (height, width)).unflatten(0, (-1, num_heads))
    return split.permute(0, 2, 3, 1, 4).flatten(3, 4)


def add_rel_pos(
    logits: Tensor, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, height: int, width: int
) -> Tensor:
    """Adds both relative position terms to logits (·, tokens, tokens); q is not scaled."""
    grid = q.unflatten(1, (height, width))
    rel_h = torch.einsum("bhwc,hkc->bhwk", grid, relative(rel_pos_h))
    rel_w = torch.einsum("bhwc,wkc->bhwk", grid, relative(rel_pos_w))
    logits = logits.unflatten(2, (height, width)).unflatten(1, (height, width))
    logits = logits + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
    return logits.flatten(3, 4).flatten(1, 2)


def relative(table: Tensor) -> Tensor:
    """The table's row for every query and key position of an axis: (size, size, head_dim)."""
    size = (table.shape[0] + 1) // 2
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions[None, :] + size - 1]
