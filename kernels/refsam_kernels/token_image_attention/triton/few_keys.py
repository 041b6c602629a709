"""Pixels to tokens: the keys are one tile, and a program ends with rows of the result."""

import triton
import triton.language as tl

from refsam_kernels.token_image_attention.triton.tiles import (
    _finish,
    _of_head,
    _project,
    _project_out,
)


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
    queries, keys, channels, heads, head_width, added_expression_stride, added_row_stride,
    added_token_stride, scale, eps,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
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
            head, first, queries, head_width, added_row_stride, added_token_stride, HEAD, QUERIES,
        )  # fmt: skip
        b_added = tl.load(p_added + o_added, mask=is_query, other=0.0).to(tl.float32)
        b_q = _project(b_tokens, q_weight_ptr, head, head_width, channels, HEAD, CHANNELS)
        b_q = (b_q + tl.trans(b_added)).to(b_tokens.dtype)
        o_key, is_key = _of_head(head, 0, length, head_width, keys, 1, HEAD, KEYS)
        b_k = tl.load(k_ptr + i_keys + o_key, mask=is_key, other=0.0)
        b_v = tl.load(v_ptr + i_keys + o_key, mask=is_key, other=0.0)
        scores = tl.dot(b_q, b_k) * scale
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
        m_i = tl.max(scores, 1)
        p = tl.exp(scores - m_i[:, None])
        l_i = tl.sum(p, 1)
        p = (p / l_i[:, None]).to(b_v.dtype)
        b_attended = tl.dot(p, tl.trans(b_v))
        if x_ptr is not None:
            o_query, _ = _of_head(head, first, queries, head_width, queries, 1, HEAD, QUERIES)
            tl.store(q_ptr + i_queries + o_query, tl.trans(b_q), mask=is_query)
            b_kept = tl.trans(b_attended).to(attended_ptr.dtype.element_ty)
            tl.store(attended_ptr + i_queries + o_query, b_kept, mask=is_query)
            p_sums = log_sum_exp_ptr + (expression * heads + head) * queries + first + row
            tl.store(p_sums, m_i + tl.log(l_i), mask=first + row < queries)
        b_update += _project_out(
            b_attended, out_weight_ptr, head, heads, head_width, channels, HEAD, CHANNELS
        )
    _finish(
        b_update, out_added_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr, x_ptr,
        statistics_ptr, expression * queries + first, queries - first, channels, eps, QUERIES,
        CHANNELS,
    )  # fmt: skip
