"""The forward of `rel_pos_attention`: one program per tile of queries of a window and head, online softmax over its keys."""

import triton
import triton.language as tl

from refsam_kernels.rel_pos_attention.triton.tiles import (
    LOG2E,
    _key_positions,
    _load,
    _load_keys,
    _locate,
    _query_positions,
    _scores,
    _store,
    _store_relative,
    _terms_of_columns,
    _terms_of_rows,
    _wide,
)


@triton.jit
def _forward_kernel(
    qkv,  # (B, h, w, 3*D), any strides
    qkv_bias,  # (3*D,) or None
    table_h,
    table_w,  # (2*WINDOW_H-1, HEAD_DIM), (2*WINDOW_W-1, HEAD_DIM)
    rel_h,
    rel_w,  # scratch, float32: (B, heads, WINDOW_H, h*w), (B, heads, h*w, WINDOW_W)
    out,  # (B, h, w, D)
    log_sum_exp,  # (B, heads, h, w) float32
    stride_b,
    stride_y,
    stride_x,
    stride_c,  # of qkv
    h,
    w,
    heads,
    tiles,
    scale,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTIAL: tl.constexpr,  # some windows stick out of the grid
    PADDED: tl.constexpr,  # and are filled up with padding tokens
    MASKED: tl.constexpr,  # some tiles have positions that are no keys
):
    # A tile that does not fit the window must not pass for one that does.
    tl.static_assert(MASKED or (WINDOW_H % ROWS == 0 and WINDOW_W % COLUMNS == 0))
    tl.static_assert(MASKED or PADDED or not PARTIAL)
    tile, head, image, top, left, height, width = _locate(tiles, heads, h, w, WINDOW_H, WINDOW_W)
    if tile * BLOCK >= height * width:
        return
    y, x, exists = _query_positions(tile, height, width, BLOCK)
    token = (top + y) * w + left + x
    channels = heads * HEAD_DIM
    q_base = qkv + image * stride_b + head.to(tl.int64) * HEAD_DIM * stride_c
    k_base = q_base + _wide(channels) * stride_c
    v_base = k_base + _wide(channels) * stride_c
    offsets = (top + y).to(tl.int64) * stride_y + (left + x).to(tl.int64) * stride_x
    q0 = _load(q_base, offsets, exists, stride_c, HEAD_DIM, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = _load(q_base, offsets, exists, stride_c, HEAD_DIM, D0, D1)

    plane = image * heads + head
    tokens = h * w
    rel_h += plane * WINDOW_H * tokens
    rel_w += plane * tokens * WINDOW_W
    _store_relative(
        q0,
        q1,
        table_h,
        table_w,
        rel_h,
        rel_w,
        y,
        x,
        exists,
        token,
        tokens,
        WINDOW_H,
        WINDOW_W,
        HEAD_DIM,
        D0,
        D1,
        CHUNK,
    )
    tl.debug_barrier()  # other threads of this program read what was stored

    k_bias = qkv_bias
    v_bias = qkv_bias
    if qkv_bias is not None:
        k_bias = qkv_bias + channels + head * HEAD_DIM
        v_bias = k_bias + channels
    key_height = height
    key_width = width
    if PADDED:
        key_height = WINDOW_H
        key_width = WINDOW_W
    m_i = tl.full([BLOCK], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK], tl.float32)
    acc0 = tl.zeros([BLOCK, D0], tl.float32)
    acc1 = tl.zeros([BLOCK, D1 if D1 > 0 else 1], tl.float32)
    for column in range(0, key_width, COLUMNS):
        term_w = _terms_of_columns(rel_w, token, exists, column, WINDOW_W, COLUMNS)
        for row in range(0, key_height, ROWS):
            key_y, key_x = _key_positions(row, column, ROWS, COLUMNS)
            is_real = (key_y < height) & (key_x < width)
            key_offsets = (top + key_y).to(tl.int64) * stride_y
            key_offsets += (left + key_x).to(tl.int64) * stride_x
            k0 = _load_keys(k_base, key_offsets, is_real, stride_c, k_bias, HEAD_DIM, 0, D0, PADDED)
            k1 = k0
            if D1 > 0:
                k1 = _load_keys(
                    k_base, key_offsets, is_real, stride_c, k_bias, HEAD_DIM, D0, D1, PADDED
                )
            term_h = _terms_of_rows(rel_h, token, exists, tokens, row, WINDOW_H, ROWS)
            terms = tl.reshape(term_h[:, :, None] + term_w[:, None, :], [BLOCK, ROWS * COLUMNS])
            scores = _scores(q0, q1, k0, k1, terms, scale, D1)
            if MASKED:
                is_key = (key_y < key_height) & (key_x < key_width)
                scores = tl.where(is_key[None, :], scores, float("-inf"))
            m_ij = tl.maximum(m_i, tl.max(scores, 1))
            p = tl.exp2(scores * LOG2E - (m_ij * LOG2E)[:, None])  # one multiply-add
            alpha = tl.exp2((m_i - m_ij) * LOG2E)
            m_i = m_ij
            l_i = l_i * alpha + tl.sum(p, 1)
            v = _load_keys(v_base, key_offsets, is_real, stride_c, v_bias, HEAD_DIM, 0, D0, PADDED)
            p = p.to(v.dtype)
            acc0 = tl.dot(p, v, acc0 * alpha[:, None], input_precision="ieee")
            if D1 > 0:
                v = _load_keys(
                    v_base, key_offsets, is_real, stride_c, v_bias, HEAD_DIM, D0, D1, PADDED
                )
                acc1 = tl.dot(p, v, acc1 * alpha[:, None], input_precision="ieee")

    offsets = (image * tokens + token) * channels + head * HEAD_DIM
    _store(out, offsets, exists, acc0 / l_i[:, None], HEAD_DIM, 0, D0)
    if D1 > 0:
        _store(out, offsets, exists, acc1 / l_i[:, None], HEAD_DIM, D0, D1)
    tl.store(log_sum_exp + plane * tokens + token, m_i + tl.log(l_i), mask=exists)
