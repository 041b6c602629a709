"""Shared by the kernels: tiles of heads, projections in registers, and the end of a row."""

import triton
import triton.language as tl

from refsam_kernels.core.triton_math import row_statistics


@triton.jit
def _of_head(
    head, first, count, head_width, row_stride, token_stride,
    HEAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Offsets (HEAD, TOKENS) of a head's tokens from `first` on in (internal width, count), and which of them exist."""
    inner, token = tl.arange(0, HEAD), first + tl.arange(0, TOKENS)
    offset = (head * head_width + inner)[:, None] * row_stride + token[None, :] * token_stride
    return offset, (inner < head_width)[:, None] & (token < count)[None, :]


@triton.jit
def _project(
    tokens, weight_ptr, head, head_width, channels, HEAD: tl.constexpr, CHANNELS: tl.constexpr
):
    """tokens (M, CHANNELS) times a head's rows of a weight (internal width, channels): (M, HEAD) in float32."""
    offset, inside = _of_head(head, 0, channels, head_width, channels, 1, HEAD, CHANNELS)
    b_weight = tl.load(weight_ptr + offset, mask=inside, other=0.0)
    return tl.dot(tokens, tl.trans(b_weight))


@triton.jit
def _project_out(
    attended, out_weight_ptr, head, heads, head_width, channels,
    HEAD: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """attended (M, HEAD) times a head's columns of the weight (channels, internal width): (M, CHANNELS) in float32."""
    width = heads * head_width
    offset, inside = _of_head(head, 0, channels, head_width, 1, width, HEAD, CHANNELS)
    b_weight = tl.load(out_weight_ptr + offset, mask=inside, other=0.0)
    return tl.dot(attended.to(b_weight.dtype), b_weight)


@triton.jit
def _finish(
    update,  # (M, CHANNELS) float32
    added_ptr,  # (channels,), to be added to the update
    residual_ptr,  # (rows, channels)
    norm_weight_ptr,  # (channels,)
    norm_bias_ptr,  # (channels,)
    out_ptr,  # (rows, channels)
    x_ptr,  # (rows, channels) float32, or None
    statistics_ptr,  # (rows, 2) float32, or None
    first_row, row_count, channels, eps,
    M: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Residual and LayerNorm of M rows from `first_row` on; the first `row_count` are in range."""
    row, channel = tl.arange(0, M), tl.arange(0, CHANNELS)
    is_row, is_channel = row < row_count, channel < channels
    inside = is_row[:, None] & is_channel[None, :]
    offset = (first_row + row)[:, None] * channels + channel[None, :]
    b_added = tl.load(added_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    b_x = tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    b_x += update + b_added[None, :]
    mean, deviation = row_statistics(b_x, inside, channels, eps)
    b_weight = tl.load(norm_weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    b_bias = tl.load(norm_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    b_out = (b_x - mean[:, None]) * deviation[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(out_ptr + offset, b_out.to(out_ptr.dtype.element_ty), mask=inside)
    if x_ptr is not None:
        tl.store(x_ptr + offset, b_x, mask=inside)
        tl.store(statistics_ptr + 2 * (first_row + row), mean, mask=is_row)
        tl.store(statistics_ptr + 2 * (first_row + row) + 1, deviation, mask=is_row)
