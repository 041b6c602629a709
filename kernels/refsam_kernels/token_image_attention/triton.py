"""Attention between few tokens and many pixels in Triton, with the output projection, residual and LayerNorm in the same kernel.

The pixels' projections are made in registers, head by head, from the tile of pixels that a program holds; those of the few
tokens are small matrix products before it. Pixels to tokens: the keys are one tile, and a program ends with rows of the result.
Tokens to pixels: a program has a tile of keys, and a second kernel joins the tiles in their order. The backward's matrix products
are those of `fallback.py`; its attention is one kernel for both directions. No atomics: two runs agree bit by bit.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refsam_kernels.core.triton_aot import CompileCase, Launch
from refsam_kernels.core.triton_math import row_statistics
from refsam_kernels.token_image_attention.fallback import gradients, without_padding
from refsam_kernels.token_image_attention.outputs import Outputs, empty_outputs
from refsam_kernels.token_image_attention.projection import Projection

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_CHANNELS = 512
WIDEST_HEAD = 128
FEW = 64  # tokens that are one tile: keys in one direction, queries in the other
ROWS = 16  # of the result that a program of `_join_kernel` makes


@triton.jit
def _of_head(
    head,
    first,
    count,
    head_width,
    row_stride,
    token_stride,
    HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
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
    attended,
    out_weight_ptr,
    head,
    heads,
    head_width,
    channels,
    HEAD: tl.constexpr,
    CHANNELS: tl.constexpr,
):
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
    first_row,
    row_count,
    channels,
    eps,
    M: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The residual and the LayerNorm of M rows from `first_row` on, of which `row_count` exist."""
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


@triton.jit(do_not_specialize=["keys"])
def _few_keys_kernel(
    tokens_ptr,  # (expressions, queries, channels), with the positions that are their own
    q_added_ptr,  # (expressions, internal width, queries), any strides
    q_weight_ptr,  # (internal width, channels)
    k_ptr,  # (expressions, internal width, keys)
    v_ptr,  # (expressions, internal width, keys)
    lengths_ptr,  # (expressions,) int64, or None
    out_weight_ptr,  # (channels, internal width)
    out_added_ptr,  # (channels,)
    residual_ptr,  # (expressions, queries, channels)
    norm_weight_ptr,  # (channels,)
    norm_bias_ptr,  # (channels,)
    out_ptr,  # (expressions, queries, channels)
    x_ptr,  # like out, float32; this and the following are None where nothing is kept
    statistics_ptr,  # (expressions, queries, 2) float32
    q_ptr,  # (expressions, internal width, queries)
    attended_ptr,  # (expressions, internal width, queries)
    log_sum_exp_ptr,  # (expressions, heads, queries) float32
    queries,
    keys,
    channels,
    heads,
    head_width,
    added_expression_stride,
    added_row_stride,
    added_token_stride,
    scale,
    eps,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """QUERIES queries of one expression, all heads, to keys that are one tile."""
    first = tl.program_id(0).to(tl.int64) * QUERIES
    expression = tl.program_id(1).to(tl.int64)
    width = heads * head_width
    length = keys
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + expression)
    row, channel, key = tl.arange(0, QUERIES), tl.arange(0, CHANNELS), tl.arange(0, KEYS)
    inside = (first + row < queries)[:, None] & (channel < channels)[None, :]
    offset = (expression * queries + first + row)[:, None] * channels + channel[None, :]
    b_tokens = tl.load(tokens_ptr + offset, mask=inside, other=0.0)
    b_update = tl.zeros((QUERIES, CHANNELS), tl.float32)
    i_keys = expression * width * keys
    i_queries = expression * width * queries
    p_added = q_added_ptr + expression * added_expression_stride
    for head in range(heads):
        o_added, is_query = _of_head(
            head,
            first,
            queries,
            head_width,
            added_row_stride,
            added_token_stride,
            HEAD,
            QUERIES,
        )
        b_added = tl.load(p_added + o_added, mask=is_query, other=0.0).to(tl.float32)
        b_q = _project(b_tokens, q_weight_ptr, head, head_width, channels, HEAD, CHANNELS)
        b_q = (b_q + tl.trans(b_added)).to(b_tokens.dtype)
        o_key, is_key = _of_head(head, 0, length, head_width, keys, 1, HEAD, KEYS)
        b_k = tl.load(k_ptr + i_keys + o_key, mask=is_key, other=0.0)
        b_v = tl.load(v_ptr + i_keys + o_key, mask=is_key, other=0.0)
        b_logits = tl.dot(b_q, b_k) * scale
        b_logits = tl.where((key < length)[None, :], b_logits, float("-inf"))
        b_highest = tl.max(b_logits, 1)
        b_weights = tl.exp(b_logits - b_highest[:, None])
        b_total = tl.sum(b_weights, 1)
        b_weights = (b_weights / b_total[:, None]).to(b_v.dtype)
        b_attended = tl.dot(b_weights, tl.trans(b_v))
        if x_ptr is not None:
            o_query, _ = _of_head(head, first, queries, head_width, queries, 1, HEAD, QUERIES)
            tl.store(q_ptr + i_queries + o_query, tl.trans(b_q), mask=is_query)
            b_kept = tl.trans(b_attended).to(attended_ptr.dtype.element_ty)
            tl.store(attended_ptr + i_queries + o_query, b_kept, mask=is_query)
            p_sums = log_sum_exp_ptr + (expression * heads + head) * queries + first + row
            tl.store(p_sums, b_highest + tl.log(b_total), mask=first + row < queries)
        b_update += _project_out(
            b_attended, out_weight_ptr, head, heads, head_width, channels, HEAD, CHANNELS
        )
    _finish(
        b_update,
        out_added_ptr,
        residual_ptr,
        norm_weight_ptr,
        norm_bias_ptr,
        out_ptr,
        x_ptr,
        statistics_ptr,
        expression * queries + first,
        queries - first,
        channels,
        eps,
        QUERIES,
        CHANNELS,
    )


@triton.jit(do_not_specialize=["queries"])
def _many_keys_kernel(
    tokens_ptr,  # (expressions, keys, channels), with the positions that are their own
    content_ptr,  # (expressions, keys, channels), without positions
    k_added_ptr,  # (expressions, internal width, keys), any strides, or None
    k_weight_ptr,  # (internal width, channels)
    v_weight_ptr,  # (internal width, channels)
    q_ptr,  # (expressions, internal width, queries)
    lengths_ptr,  # (expressions,) int64, or None
    parts_ptr,  # (expressions, tiles, internal width, queries) float32, what a tile's keys give
    highest_ptr,  # (expressions, heads, tiles, queries) float32, the tile's largest logit
    totals_ptr,  # (expressions, heads, tiles, queries) float32, sum of exp(logit - highest)
    k_ptr,  # (expressions, internal width, keys), or None where nothing is kept
    v_ptr,  # likewise
    queries,
    keys,
    tiles,
    channels,
    heads,
    head_width,
    added_expression_stride,
    added_row_stride,
    added_token_stride,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """All queries of one expression to KEYS of its keys, all heads."""
    tile = tl.program_id(0).to(tl.int64)
    first = tile * KEYS
    expression = tl.program_id(1).to(tl.int64)
    width = heads * head_width
    length = keys
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + expression)
    row, channel, query = tl.arange(0, KEYS), tl.arange(0, CHANNELS), tl.arange(0, QUERIES)
    inside = (first + row < keys)[:, None] & (channel < channels)[None, :]
    offset = (expression * keys + first + row)[:, None] * channels + channel[None, :]
    b_tokens = tl.load(tokens_ptr + offset, mask=inside, other=0.0)
    b_content = tl.load(content_ptr + offset, mask=inside, other=0.0)
    i_parts = (expression * tiles + tile) * width * queries
    for head in range(heads):
        b_k = _project(b_tokens, k_weight_ptr, head, head_width, channels, HEAD, CHANNELS)
        if k_added_ptr is not None:
            o_added, is_key = _of_head(
                head, first, keys, head_width, added_row_stride, added_token_stride, HEAD, KEYS
            )
            p_added = k_added_ptr + expression * added_expression_stride + o_added
            b_k += tl.trans(tl.load(p_added, mask=is_key, other=0.0)).to(tl.float32)
        b_k = b_k.to(b_tokens.dtype)
        b_v = _project(b_content, v_weight_ptr, head, head_width, channels, HEAD, CHANNELS)
        b_v = b_v.to(b_content.dtype)
        o_query, is_query = _of_head(head, 0, queries, head_width, queries, 1, HEAD, QUERIES)
        p_q = q_ptr + expression * width * queries + o_query
        b_q = tl.load(p_q, mask=is_query, other=0.0)
        b_logits = tl.dot(b_k, b_q) * scale
        b_logits = tl.where((first + row < length)[:, None], b_logits, float("-inf"))
        b_highest = tl.max(b_logits, 0)
        # A tile may lie behind the last valid key.
        b_shift = tl.where(b_highest == float("-inf"), 0.0, b_highest)
        b_weights = tl.exp(b_logits - b_shift[None, :])
        b_part = tl.dot(tl.trans(b_v), b_weights.to(b_v.dtype))
        tl.store(parts_ptr + i_parts + o_query, b_part, mask=is_query)
        o_sums = ((expression * heads + head) * tiles + tile) * queries + query
        tl.store(highest_ptr + o_sums, b_highest, mask=query < queries)
        tl.store(totals_ptr + o_sums, tl.sum(b_weights, 0), mask=query < queries)
        if k_ptr is not None:
            o_key, is_key = _of_head(head, first, keys, head_width, keys, 1, HEAD, KEYS)
            o_key += expression * width * keys
            tl.store(k_ptr + o_key, tl.trans(b_k), mask=is_key)
            tl.store(v_ptr + o_key, tl.trans(b_v), mask=is_key)


@triton.jit(do_not_specialize=["queries"])
def _join_kernel(
    parts_ptr,  # (expressions, tiles, internal width, queries) float32
    highest_ptr,  # (expressions, heads, tiles, queries) float32
    totals_ptr,  # (expressions, heads, tiles, queries) float32
    out_weight_ptr,  # (channels, internal width)
    out_added_ptr,  # (channels,)
    residual_ptr,  # (expressions, queries, channels)
    norm_weight_ptr,  # (channels,)
    norm_bias_ptr,  # (channels,)
    out_ptr,  # (expressions, queries, channels)
    x_ptr,  # like out, float32; this and the following are None where nothing is kept
    statistics_ptr,  # (expressions, queries, 2) float32
    attended_ptr,  # (expressions, internal width, queries)
    log_sum_exp_ptr,  # (expressions, heads, queries) float32
    queries,
    tiles,
    channels,
    heads,
    head_width,
    eps,
    QUERIES: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """QUERIES queries of one expression: adds up what the tiles of keys gave, in their order, and makes rows of the result."""
    first = tl.program_id(0).to(tl.int64) * QUERIES
    expression = tl.program_id(1).to(tl.int64)
    width = heads * head_width
    query = first + tl.arange(0, QUERIES)
    is_query = query < queries
    b_update = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for head in range(heads):
        o_sums = (expression * heads + head) * tiles * queries + query[None, :]
        b_highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            is_sum = (tile < tiles)[:, None] & is_query[None, :]
            p_highest = highest_ptr + o_sums + tile[:, None] * queries
            b_each = tl.load(p_highest, mask=is_sum, other=float("-inf"))
            b_highest = tl.maximum(b_highest, tl.max(b_each, 0))
        b_highest = tl.where(is_query, b_highest, 0.0)
        o_head, is_head = _of_head(head, first, queries, head_width, queries, 1, HEAD, QUERIES)
        b_total = tl.where(is_query, 0.0, 1.0)
        b_attended = tl.zeros((HEAD, QUERIES), tl.float32)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            is_sum = (tile < tiles)[:, None] & is_query[None, :]
            o_tile = o_sums + tile[:, None] * queries
            b_each = tl.load(highest_ptr + o_tile, mask=is_sum, other=float("-inf"))
            b_factors = tl.exp(b_each - b_highest[None, :])  # (TILES, QUERIES)
            b_totals = tl.load(totals_ptr + o_tile, mask=is_sum, other=0.0)
            b_total += tl.sum(b_factors * b_totals, 0)
            o_part = (expression * tiles + tile)[:, None, None] * (width * queries)
            is_part = (tile < tiles)[:, None, None] & is_head[None, :, :]
            p_part = parts_ptr + o_part + o_head[None, :, :]
            b_parts = tl.load(p_part, mask=is_part, other=0.0)
            b_attended += tl.sum(b_parts * b_factors[:, None, :], 0)
        b_attended /= b_total[None, :]
        if x_ptr is not None:
            p_attended = attended_ptr + expression * width * queries + o_head
            b_kept = b_attended.to(attended_ptr.dtype.element_ty)
            tl.store(p_attended, b_kept, mask=is_head)
            p_sums = log_sum_exp_ptr + (expression * heads + head) * queries + query
            tl.store(p_sums, b_highest + tl.log(b_total), mask=is_query)
        b_update += _project_out(
            tl.trans(b_attended),
            out_weight_ptr,
            head,
            heads,
            head_width,
            channels,
            HEAD,
            CHANNELS,
        )
    _finish(
        b_update,
        out_added_ptr,
        residual_ptr,
        norm_weight_ptr,
        norm_bias_ptr,
        out_ptr,
        x_ptr,
        statistics_ptr,
        expression * queries + first,
        queries - first,
        channels,
        eps,
        QUERIES,
        CHANNELS,
    )


@triton.jit(do_not_specialize=["expressions", "queries", "keys"])
def _backward_kernel(
    grad_ptr,  # (expressions, internal width, queries), to what is attended to
    q_ptr,  # (expressions, internal width, queries)
    k_ptr,  # (expressions, internal width, keys)
    v_ptr,  # (expressions, internal width, keys)
    attended_ptr,  # (expressions, internal width, queries)
    log_sum_exp_ptr,  # (expressions, heads, queries) float32
    lengths_ptr,  # (expressions,) int64, or None
    on_q_ptr,  # (key tiles, expressions, internal width, queries)
    on_k_ptr,  # (query tiles, expressions, internal width, keys)
    on_v_ptr,  # likewise
    expressions,
    queries,
    keys,
    heads,
    head_width,
    scale,
    HAS_ALL_KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """One head of QUERIES queries and KEYS keys; gradients to one side are parts, one for each tile of the other."""
    query_tile, key_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    expression, head = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2) % heads
    width = heads * head_width
    length = keys
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + expression)
    query = query_tile * QUERIES + tl.arange(0, QUERIES)
    key = key_tile * KEYS + tl.arange(0, KEYS)
    o_query, is_query = _of_head(
        head, query_tile * QUERIES, queries, head_width, queries, 1, HEAD, QUERIES
    )
    o_key, is_key = _of_head(head, key_tile * KEYS, keys, head_width, keys, 1, HEAD, KEYS)
    i_query, i_key = expression * width * queries, expression * width * keys
    b_q = tl.load(q_ptr + i_query + o_query, mask=is_query, other=0.0)
    b_grad = tl.load(grad_ptr + i_query + o_query, mask=is_query, other=0.0)
    b_k = tl.load(k_ptr + i_key + o_key, mask=is_key, other=0.0)
    b_v = tl.load(v_ptr + i_key + o_key, mask=is_key, other=0.0)
    b_logits = tl.dot(tl.trans(b_q), b_k) * scale
    b_logits = tl.where((key < length)[None, :], b_logits, float("-inf"))
    b_on_weights = tl.dot(tl.trans(b_grad), b_v)
    if HAS_ALL_KEYS:
        b_weights = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
        b_weights /= tl.sum(b_weights, 1)[:, None]
        b_mean = tl.sum(b_weights * b_on_weights, 1)
    else:  # the same from what the forward kept, which is rounded
        p_sums = log_sum_exp_ptr + (expression * heads + head) * queries + query
        b_sums = tl.load(p_sums, mask=query < queries, other=0.0)
        b_weights = tl.exp(b_logits - b_sums[:, None])
        b_attended = tl.load(attended_ptr + i_query + o_query, mask=is_query, other=0.0)
        b_mean = tl.sum(b_grad.to(tl.float32) * b_attended.to(tl.float32), 0)
    b_on_logits = b_weights * (b_on_weights - b_mean[:, None]) * scale
    b_on_logits = b_on_logits.to(b_q.dtype)
    b_on_q = tl.dot(b_k, tl.trans(b_on_logits))
    b_on_k = tl.dot(b_q, b_on_logits)
    b_on_v = tl.dot(b_grad, b_weights.to(b_grad.dtype))
    i_query += key_tile * expressions * width * queries
    i_key += query_tile * expressions * width * keys
    tl.store(on_q_ptr + i_query + o_query, b_on_q.to(on_q_ptr.dtype.element_ty), mask=is_query)
    tl.store(on_k_ptr + i_key + o_key, b_on_k.to(on_k_ptr.dtype.element_ty), mask=is_key)
    tl.store(on_v_ptr + i_key + o_key, b_on_v.to(on_v_ptr.dtype.element_ty), mask=is_key)


def not_supported_reasons(
    queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, q_weight: Tensor, *others: Any
) -> list[str]:
    """Why the kernels cannot take these."""
    num_heads = others[-3]
    channels, head = queries.shape[2], len(q_weight) // num_heads
    few = min(queries.shape[1], keys.shape[1])
    dtypes = dict.fromkeys((queries.dtype, q_weight.dtype))
    reasons = [
        f"computes float32, float16 and bfloat16, got {dtype}"
        for dtype in dtypes
        if dtype not in DTYPES
    ]
    if channels > WIDEST_CHANNELS:
        reasons.append(f"takes at most {WIDEST_CHANNELS} channels, got {channels}")
    if head > WIDEST_HEAD:
        reasons.append(f"takes heads of at most {WIDEST_HEAD} channels, got {head}")
    if few > FEW:
        reasons.append(f"takes at most {FEW} queries or at most {FEW} keys, got {few} and more")
    return reasons


def backward_not_supported_reasons(grad: Tensor, *arguments: Any) -> list[str]:
    """Like `not_supported_reasons`."""
    return not_supported_reasons(*arguments)


def forward(
    queries: Tensor,
    keys: Tensor,
    query_pe: Tensor,
    key_pe: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_lengths: Tensor | None,
    num_heads: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Like `reference.forward`: products in the dtype of the weights, sum, softmax and LayerNorm in float32."""
    keys, key_pe = without_padding(keys, key_pe, key_lengths)
    to_q = Projection(queries, query_pe, q_weight, q_bias, remember=not keep)
    to_k = Projection(keys, key_pe, k_weight, None, remember=not keep)
    to_v = Projection(keys, None, v_weight, None)
    whole, has_few_keys = slice(len(queries)), keys.shape[1] <= FEW
    made = {"k": to_k(whole), "v": to_v(whole)} if has_few_keys else {"q": to_q(whole)}
    outputs = empty_outputs(queries, keys, q_weight, num_heads, keep)
    outputs = outputs._replace(**made) if keep else outputs
    tensors: dict[str, Any] = dict.fromkeys(Outputs._fields)  # None: not kept
    tensors |= (outputs._asdict() if keep else {"out": outputs.out}) | made
    tensors |= {"lengths": None if key_lengths is None else key_lengths.contiguous()}
    tensors |= {"residual": queries.contiguous()}
    tensors |= {"out_weight": out_weight.contiguous(), "norm_weight": norm_weight.contiguous()}
    tensors |= {"out_added": torch.addmv(out_bias, out_weight, v_bias)}
    tensors |= {"norm_bias": norm_bias.contiguous()}
    sizes = _sizes(queries, keys, q_weight, num_heads) | {"eps": eps}
    if not len(queries):
        return outputs
    if has_few_keys:
        _few_keys_launch(to_q, tensors, sizes).run()
    else:
        for launch in _many_keys_launches(to_k, to_v, tensors, sizes):
            launch.run()
    return outputs


def backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Like `reference.backward`; of the forward only the attention's weights are computed again."""
    return gradients(_attend_backward, grad, *arguments)


def _sizes(queries: Tensor, keys: Tensor, q_weight: Tensor, num_heads: int) -> dict[str, Any]:
    """What the kernels of one call have in common; blocks are powers of two."""
    (_, query_count, channels), head_width = queries.shape, len(q_weight) // num_heads
    # Single precision has no tensor cores to multiply on: its operands lie in registers, which hold less.
    tile = 16 if q_weight.element_size() == 4 or channels > 256 else 32
    few_queries, few_keys = (_block(count) for count in (query_count, keys.shape[1]))
    return {
        "queries": query_count,
        "keys": keys.shape[1],
        "channels": channels,
        "heads": num_heads,
        "head_width": head_width,
        "scale": head_width**-0.5,
        "QUERIES": tile if keys.shape[1] <= FEW else few_queries,
        "KEYS": few_keys if keys.shape[1] <= FEW else tile,
        "CHANNELS": _block(channels),
        "HEAD": _block(head_width),
    }


def _block(count: int) -> int:
    """The smallest block that holds so many; a product takes at least 16."""
    return max(16, triton.next_power_of_2(count))


def _added(projection: Projection, count: int, name: str) -> dict[str, Any]:
    """What a projection adds, for each expression, without a copy, and its strides."""
    tokens = projection.tokens
    added, strides = projection.added, (0, 0, 0)
    if added is not None:
        added = added.expand(len(tokens), len(projection.weight), count)
        strides = (added.stride(0), added.stride(1), added.stride(2))
    names = ("added_expression_stride", "added_row_stride", "added_token_stride")
    return {f"{name}_ptr": added, **dict(zip(names, strides, strict=True))}


def _launch(
    kernel: Any, programs: tuple[int, ...], tensors: dict[str, Any], sizes: dict[str, Any]
) -> Launch:
    """The kernel with those of the arguments that it takes."""
    arguments = {f"{name}_ptr": tensor for name, tensor in tensors.items()} | sizes
    taken = {name: arguments[name] for name in kernel.arg_names}
    return Launch(kernel, programs, taken, num_warps=8, num_stages=1)


def _few_keys_launch(to_q: Projection, tensors: dict[str, Any], sizes: dict[str, Any]) -> Launch:
    tensors = tensors | {"tokens": to_q.tokens.contiguous(), "q_weight": to_q.weight.contiguous()}
    sizes = sizes | _added(to_q, sizes["queries"], "q_added")
    tiles = triton.cdiv(sizes["queries"], sizes["QUERIES"])
    return _launch(_few_keys_kernel, (tiles, len(to_q.tokens)), tensors, sizes)


def _many_keys_launches(
    to_k: Projection, to_v: Projection, tensors: dict[str, Any], sizes: dict[str, Any]
) -> list[Launch]:
    expressions, tiles = len(to_k.tokens), triton.cdiv(sizes["keys"], sizes["KEYS"])
    new = partial(to_k.tokens.new_empty, dtype=torch.float32)
    sums = (expressions, sizes["heads"], tiles, sizes["queries"])
    tensors = tensors | {
        "tokens": to_k.tokens.contiguous(),
        "content": to_v.tokens.contiguous(),
        "k_weight": to_k.weight.contiguous(),
        "v_weight": to_v.weight.contiguous(),
        "parts": new(expressions, tiles, len(to_k.weight), sizes["queries"]),
        "highest": new(sums),
        "totals": new(sums),
    }
    sizes = sizes | {"tiles": tiles} | _added(to_k, sizes["keys"], "k_added")
    attend = _launch(_many_keys_kernel, (tiles, expressions), tensors, sizes)
    # A program of the second kernel adds up several parts at a time, as many as registers hold.
    at_a_time = min(triton.next_power_of_2(tiles), max(1, 512 // sizes["HEAD"]))
    sizes = sizes | {"QUERIES": ROWS, "TILES": at_a_time}
    programs = (triton.cdiv(sizes["queries"], ROWS), expressions)
    return [attend, _launch(_join_kernel, programs, tensors, sizes)]


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    log_sum_exp: Tensor,
    key_lengths: Tensor | None,
    num_heads: int,
) -> list[Tensor]:
    """Gradients to q, k and v for `grad`, that to what is attended to."""
    tensors = {"q": q, "k": k, "v": v, "attended": attended, "log_sum_exp": log_sum_exp}
    tensors = {name: x.contiguous() for name, x in (tensors | {"grad": grad}).items()}
    lengths = None if key_lengths is None else key_lengths.contiguous()
    launch, gradients = _backward_launch(tensors, lengths, num_heads)
    if len(q):
        launch.run()
    return [
        parts[0] if len(parts) == 1 else parts.sum(0).to(own.dtype)
        for parts, own in zip(gradients, (q, k, v), strict=True)
    ]


def _backward_launch(
    tensors: dict[str, Tensor], key_lengths: Tensor | None, num_heads: int
) -> tuple[Launch, list[Tensor]]:
    """The launch, and the gradients to q, k and v that it writes, in parts (parts, P, I, T)."""
    q, k, v = (tensors[name] for name in "qkv")
    (expressions, width, queries), keys = q.shape, k.shape[2]
    tile = 32 if q.element_size() == 4 else 64
    few_keys = keys <= FEW
    blocks = {"QUERIES": tile if few_keys else _block(queries)}
    blocks |= {"KEYS": _block(keys) if few_keys else tile, "HEAD": _block(width // num_heads)}
    tiles = (triton.cdiv(queries, blocks["QUERIES"]), triton.cdiv(keys, blocks["KEYS"]))
    parts = [
        x.new_empty(count, *x.shape, dtype=x.dtype if count == 1 else torch.float32)
        for x, count in ((q, tiles[1]), (k, tiles[0]), (v, tiles[0]))
    ]
    written = dict(zip(("on_q", "on_k", "on_v"), parts, strict=True))
    sizes = {"expressions": expressions, "queries": queries, "keys": keys, "heads": num_heads}
    head_width = width // num_heads
    sizes |= {"head_width": head_width, "scale": head_width**-0.5} | blocks
    sizes["HAS_ALL_KEYS"] = tiles[1] == 1
    programs = (*tiles, expressions * num_heads)
    arguments = tensors | written | {"lengths": key_lengths}
    return _launch(_backward_kernel, programs, arguments, sizes), parts


def compile_cases() -> list[CompileCase]:
    """SAM's decoder and nano's, both directions with what the backward needs, short and long sentences."""
    cases = []
    for dtype, channels, tokens in (
        (torch.bfloat16, 128, 16),
        (torch.bfloat16, 256, 16),
        (torch.bfloat16, 256, 64),
        (torch.float16, 256, 32),
        (torch.float32, 256, 32),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, {channels} channels, {tokens} tokens"
        for kind, launch in _example_launches(dtype, channels, tokens):
            # Rows of 256 channels in single precision do not fit the registers, by some 40 of their values.
            is_judged = dtype != torch.float32 or kind != "to many keys"
            limit = {} if is_judged else {"spill_limit": None}
            cases.append(launch.compile_case(f"{kind}, {name}", **limit))
    return cases


def _example_launches(
    dtype: torch.dtype, channels: int, tokens: int
) -> Iterator[tuple[str, Launch]]:
    """Eight expressions' launches on the meta device, 16 channels to a head."""
    internal, heads = channels // 2, channels // 32
    few = torch.empty(8, tokens, channels, dtype=dtype, device="meta")
    many = few.new_empty(8, 4096, channels)
    weight, bias = few.new_empty(internal, channels), few.new_empty(internal)
    lengths = torch.empty(8, dtype=torch.int64, device="meta")
    for queries, keys, key_lengths in ((few, many, None), (many, few, lengths)):
        outputs = empty_outputs(queries, keys, weight, heads, keep=True)
        tensors: dict[str, Any] = outputs._asdict() | {"lengths": key_lengths, "residual": queries}
        tensors |= {"out_weight": weight.T.contiguous(), "out_added": few.new_empty(channels)}
        norm = torch.empty(channels, device="meta")
        tensors |= {"norm_weight": norm, "norm_bias": norm}
        sizes = _sizes(queries, keys, weight, heads) | {"eps": 1e-5}
        to_q = Projection(queries, queries[:1], weight, bias)
        to_k, to_v = (Projection(keys, pe, weight, None) for pe in (keys[:1], None))
        if keys is few:
            yield "to few keys", _few_keys_launch(to_q, tensors, sizes)
        else:
            names = ("to many keys", "join")
            yield from zip(names, _many_keys_launches(to_k, to_v, tensors, sizes), strict=True)
        backward = outputs._asdict() | {"grad": outputs.attended}
        backward = {name: backward[name] for name in ("grad", *"qkv", "attended", "log_sum_exp")}
        launch, _ = _backward_launch(backward, key_lengths, heads)
        yield f"backward to {'few' if keys is few else 'many'} keys", launch
