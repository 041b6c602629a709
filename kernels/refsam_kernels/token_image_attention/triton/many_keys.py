"""Tokens to pixels: a program has a tile of keys, and a second kernel joins the tiles in their order."""

import triton
import triton.language as tl

from refsam_kernels.token_image_attention.triton.tiles import (
    _finish,
    _of_head,
    _project,
    _project_out,
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
    parts_ptr,  # (expressions, tiles, internal width, queries) float32, the contribution of a tile's keys
    highest_ptr,  # (expressions, heads, tiles, queries) float32, the tile's largest logit
    totals_ptr,  # (expressions, heads, tiles, queries) float32, sum of exp(logit - highest)
    k_ptr,  # (expressions, internal width, keys), or None where nothing is kept
    v_ptr,  # likewise
    queries, keys, tiles, channels, heads, head_width, added_expression_stride, added_row_stride,
    added_token_stride, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
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
        scores = tl.dot(b_k, b_q) * scale
        scores = tl.where((first + row < length)[:, None], scores, float("-inf"))
        m_i = tl.max(scores, 0)
        # A tile may lie behind the last valid key.
        b_shift = tl.where(m_i == float("-inf"), 0.0, m_i)
        p = tl.exp(scores - b_shift[None, :])
        b_part = tl.dot(tl.trans(b_v), p.to(b_v.dtype))
        tl.store(parts_ptr + i_parts + o_query, b_part, mask=is_query)
        o_sums = ((expression * heads + head) * tiles + tile) * queries + query
        tl.store(highest_ptr + o_sums, m_i, mask=query < queries)
        tl.store(totals_ptr + o_sums, tl.sum(p, 0), mask=query < queries)
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
    queries, tiles, channels, heads, head_width, eps,
    QUERIES: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of one expression: adds up the contributions of key tiles in order, finishes rows of the result."""
    first = tl.program_id(0).to(tl.int64) * QUERIES
    expression = tl.program_id(1).to(tl.int64)
    width = heads * head_width
    query = first + tl.arange(0, QUERIES)
    is_query = query < queries
    b_update = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for head in range(heads):
        o_sums = (expression * heads + head) * tiles * queries + query[None, :]
        m_i = tl.full((QUERIES,), float("-inf"), tl.float32)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            is_sum = (tile < tiles)[:, None] & is_query[None, :]
            p_highest = highest_ptr + o_sums + tile[:, None] * queries
            b_each = tl.load(p_highest, mask=is_sum, other=float("-inf"))
            m_i = tl.maximum(m_i, tl.max(b_each, 0))
        m_i = tl.where(is_query, m_i, 0.0)
        o_head, is_head = _of_head(head, first, queries, head_width, queries, 1, HEAD, QUERIES)
        l_i = tl.where(is_query, 0.0, 1.0)
        b_attended = tl.zeros((HEAD, QUERIES), tl.float32)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            is_sum = (tile < tiles)[:, None] & is_query[None, :]
            o_tile = o_sums + tile[:, None] * queries
            b_each = tl.load(highest_ptr + o_tile, mask=is_sum, other=float("-inf"))
            alpha = tl.exp(b_each - m_i[None, :])  # (TILES, QUERIES)
            b_totals = tl.load(totals_ptr + o_tile, mask=is_sum, other=0.0)
            l_i += tl.sum(alpha * b_totals, 0)
            o_part = (expression * tiles + tile)[:, None, None] * (width * queries)
            is_part = (tile < tiles)[:, None, None] & is_head[None, :, :]
            p_part = parts_ptr + o_part + o_head[None, :, :]
            b_parts = tl.load(p_part, mask=is_part, other=0.0)
            b_attended += tl.sum(b_parts * alpha[:, None, :], 0)
        b_attended /= l_i[None, :]
        if x_ptr is not None:
            p_attended = attended_ptr + expression * width * queries + o_head
            b_kept = b_attended.to(attended_ptr.dtype.element_ty)
            tl.store(p_attended, b_kept, mask=is_head)
            p_sums = log_sum_exp_ptr + (expression * heads + head) * queries + query
            tl.store(p_sums, m_i + tl.log(l_i), mask=is_query)
        b_update += _project_out(
            tl.trans(b_attended), out_weight_ptr, head, heads, head_width, channels, HEAD, CHANNELS,
        )  # fmt: skip
    _finish(
        b_update, out_added_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr, x_ptr,
        statistics_ptr, expression * queries + first, queries - first, channels, eps, QUERIES,
        CHANNELS,
    )  # fmt: skip
