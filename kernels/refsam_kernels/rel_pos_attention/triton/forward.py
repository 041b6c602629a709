"""The forward of `rel_pos_attention`: one program per tile of queries of a window and head, online softmax over its keys."""

import triton
import triton.language as tl

from refsam_kernels.rel_pos_attention.triton.tiles import (
    LN2,
    LOG2E,
    _check_tile,
    _head_pointers,
    _key_grid,
    _key_tile,
    _load,
    _load_keys,
    _locate,
    _offsets,
    _query_scores,
    _query_tile,
    _store,
    _store_relative,
    _terms_of_columns,
    _zeros,
)


@triton.jit
def _forward_kernel(
    qkv,  # (B, h, w, 3*D), any strides
    qkv_bias,  # (3*D,) or None
    table_h, table_w,  # (2*WINDOW_H-1, HEAD_DIM), (2*WINDOW_W-1, HEAD_DIM)
    rel_h, rel_w,  # scratch, float32: (B, heads, WINDOW_H, h*w), (B, heads, h*w, WINDOW_W)
    out,  # (B, h, w, D)
    log_sum_exp,  # (B, heads, h, w) float32
    stride_b, stride_y, stride_x, stride_c,  # of qkv
    h, w, heads, tiles, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTIAL: tl.constexpr,  # some windows stick out of the grid
    PADDED: tl.constexpr,  # and are filled up with padding tokens
    MASKED: tl.constexpr,  # some tiles have positions that are no keys
):  # fmt: skip
    WINDOW: tl.constexpr = (WINDOW_H, WINDOW_W)
    HEAD: tl.constexpr = (HEAD_DIM, D0, D1)
    KEYS: tl.constexpr = (ROWS, COLUMNS)
    _check_tile(WINDOW, KEYS, PARTIAL, PADDED, MASKED)
    tile, head, image, window = _locate(tiles, heads, h, w, WINDOW, PARTIAL)
    if tile * BLOCK >= window[2] * window[3]:
        return
    query = _query_tile(tile, window, w, BLOCK)
    y, x, token, exists = query
    channels = heads * HEAD_DIM
    q_base, k_base, v_base = _head_pointers(qkv, image, head, heads, stride_b, stride_c, HEAD_DIM)
    offsets = _offsets(window, y, x, stride_y, stride_x)
    q0 = _load(q_base, offsets, exists, stride_c, HEAD_DIM, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = _load(q_base, offsets, exists, stride_c, HEAD_DIM, D0, D1)

    plane = image * heads + head
    tokens = h * w
    rel_h += plane * WINDOW_H * tokens
    rel_w += plane * tokens * WINDOW_W
    q = (q0, q1)
    _store_relative(q, (table_h, table_w), (rel_h, rel_w), query, tokens, WINDOW, HEAD, CHUNK)
    tl.debug_barrier()  # other threads of this program read what was stored

    k_bias = qkv_bias
    v_bias = qkv_bias
    if qkv_bias is not None:
        k_bias = qkv_bias + channels + head * HEAD_DIM
        v_bias = k_bias + channels
    key_height, key_width = _key_grid(window, WINDOW, PADDED)
    m_i = tl.full([BLOCK], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK], tl.float32)
    acc0, acc1 = _zeros(BLOCK, HEAD)
    for column in range(0, key_width, COLUMNS):
        term_w = _terms_of_columns(rel_w, query, column, WINDOW_W, COLUMNS)
        for row in range(0, key_height, ROWS):
            key_y, key_x, is_real = _key_tile(row, column, window, KEYS)
            key_offsets = _offsets(window, key_y, key_x, stride_y, stride_x)
            k0 = _load_keys(k_base, key_offsets, is_real, stride_c, k_bias, HEAD_DIM, 0, D0, PADDED)
            k1 = k0
            if D1 > 0:
                k1 = _load_keys(
                    k_base, key_offsets, is_real, stride_c, k_bias, HEAD_DIM, D0, D1, PADDED
                )
            k = (k0, k1)
            scores, shift = _query_scores(
                q, k, rel_h, term_w, query, tokens, row, scale * LOG2E, WINDOW_H, D1, KEYS
            )
            if MASKED:
                is_key = (key_y < key_height) & (key_x < key_width)
                scores = tl.where(is_key[None, :], scores, float("-inf"))
            m_ij = tl.maximum(m_i, tl.max(scores, 1) + shift)
            p = tl.exp2(scores - (m_ij - shift)[:, None])
            alpha = tl.exp2(m_i - m_ij)
            m_i = m_ij
            l_i = l_i * alpha + tl.sum(p, 1)
            v = _load_keys(v_base, key_offsets, is_real, stride_c, v_bias, HEAD_DIM, 0, D0, PADDED)
            p = p.to(v.dtype)
            acc0 = tl.dot(p, v, acc0 * alpha[:, None])
            if D1 > 0:
                v = _load_keys(
                    v_base, key_offsets, is_real, stride_c, v_bias, HEAD_DIM, D0, D1, PADDED
                )
                acc1 = tl.dot(p, v, acc1 * alpha[:, None])

    offsets = (image * tokens + token) * channels + head * HEAD_DIM
    _store(out, offsets, exists, acc0 / l_i[:, None], HEAD_DIM, 0, D0)
    if D1 > 0:
        _store(out, offsets, exists, acc1 / l_i[:, None], HEAD_DIM, D0, D1)
    tl.store(log_sum_exp + plane * tokens + token, (m_i + tl.log2(l_i)) * LN2, mask=exists)
