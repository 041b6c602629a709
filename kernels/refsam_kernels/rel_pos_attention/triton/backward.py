"""The backward of `rel_pos_attention`: nothing is added by two programs, so every sum has a fixed order.

`_query_gradient_kernel`, one program per tile of queries, gives dq and the gradients of the relative terms;
`_key_gradient_kernel`, one per tile of keys, gives dk and dv; see `table_gradient` for the tables.
"""

import triton
import triton.language as tl

from refsam_kernels.rel_pos_attention.triton.tiles import (
    LOG2E,
    _add_relative,
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
    _scores,
    _store,
    _store_relative,
    _terms_of_columns,
    _terms_of_rows,
    _zeros,
)


@triton.jit
def _query_gradient_kernel(
    grad_out, out,  # (B, h, w, D)
    qkv,  # (B, h, w, 3*D), any strides
    qkv_bias,  # (3*D,) or None
    table_h, table_w,  # (2*WINDOW_H-1, HEAD_DIM), (2*WINDOW_W-1, HEAD_DIM)
    log_sum_exp,  # (B, heads, h, w) float32
    grad_qkv,  # (B, h, w, 3*D); its first third is written
    rel_h, rel_w,  # written, float32: (B, heads, WINDOW_H, h*w), (B, heads, h*w, WINDOW_W)
    d_rel_h, d_rel_w,  # written, likewise: gradients of the relative terms
    delta,  # written, float32: (B, heads, h, w), sum of grad_out * out
    stride_b, stride_y, stride_x, stride_c,  # of qkv
    h, w, heads, tiles, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, PARTIAL: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr,  # as in the forward
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
    tokens = h * w
    channels = heads * HEAD_DIM
    q_base, k_base, v_base = _head_pointers(qkv, image, head, heads, stride_b, stride_c, HEAD_DIM)
    offsets = _offsets(window, y, x, stride_y, stride_x)
    q, do, delta_i = _load_queries(
        q_base, grad_out, out, offsets, image, head, heads, query, tokens, stride_c, HEAD
    )

    plane = image * heads + head
    tl.store(delta + plane * tokens + token, delta_i, mask=exists)
    # Out-of-range queries get zero probability.
    lse = tl.load(log_sum_exp + plane * tokens + token, mask=exists, other=float("inf")) * LOG2E
    rel_h += plane * WINDOW_H * tokens
    rel_w += plane * tokens * WINDOW_W
    d_rel_h += plane * WINDOW_H * tokens
    d_rel_w += plane * tokens * WINDOW_W
    tables = (table_h, table_w)
    _store_relative(q, tables, (rel_h, rel_w), query, tokens, WINDOW, HEAD, CHUNK)

    k_bias = qkv_bias
    v_bias = qkv_bias
    if qkv_bias is not None:
        k_bias = qkv_bias + channels + head * HEAD_DIM
        v_bias = k_bias + channels
    key_height, key_width = _key_grid(window, WINDOW, PADDED)
    dq0, dq1 = _zeros(BLOCK, HEAD)
    for column in range(0, key_width, COLUMNS):
        tl.debug_barrier()  # other threads of this program read what was stored
        columns = column + tl.arange(0, COLUMNS)
        term_w = _terms_of_columns(rel_w, query, column, WINDOW_W, COLUMNS)
        d_term_w = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for row in range(0, key_height, ROWS):
            key_y, key_x, is_real = _key_tile(row, column, window, KEYS)
            key_offsets = _offsets(window, key_y, key_x, stride_y, stride_x)
            k, dp = _load_keys_and_dp(
                do, k_base, v_base, key_offsets, is_real, stride_c, k_bias, v_bias, HEAD, PADDED
            )
            scores, shift = _query_scores(
                q, k, rel_h, term_w, query, tokens, row, scale * LOG2E, WINDOW_H, D1, KEYS
            )
            if MASKED:
                is_key = (key_y < key_height) & (key_x < key_width)
                scores = tl.where(is_key[None, :], scores, float("-inf"))
            p = tl.exp2(scores - (lse - shift)[:, None])
            ds = p * (dp - delta_i[:, None])
            d_terms = tl.reshape(ds, [BLOCK, ROWS, COLUMNS])
            d_term_w += tl.sum(d_terms, 1)
            d_term_h = tl.sum(d_terms, 2)
            _add_row_terms(d_rel_h, d_term_h, query, tokens, row, column, WINDOW, KEYS)
            ds = ds.to(k[0].dtype)
            dq0 = tl.dot(ds, k[0], dq0)
            if D1 > 0:
                dq1 = tl.dot(ds, k[1], dq1)
        pointers = d_rel_w + token.to(tl.int64)[:, None] * WINDOW_W + columns[None, :]
        tl.store(pointers, d_term_w, mask=exists[:, None] & (columns < WINDOW_W)[None, :])

    tl.debug_barrier()
    offsets = (image * tokens + token) * (3 * channels) + head * HEAD_DIM
    d_rel = (d_rel_h, d_rel_w)
    dq0 = _add_relative(dq0 * scale, tables, d_rel, query, tokens, WINDOW, HEAD_DIM, 0, D0, CHUNK)
    _store(grad_qkv, offsets, exists, dq0, HEAD_DIM, 0, D0)
    if D1 > 0:
        dq1 = _add_relative(
            dq1 * scale, tables, d_rel, query, tokens, WINDOW, HEAD_DIM, D0, D1, CHUNK
        )
        _store(grad_qkv, offsets, exists, dq1, HEAD_DIM, D0, D1)


@triton.jit
def _load_queries(
    q_base, grad_out, out, offsets, image, head, heads, query, tokens, stride_c,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Queries, the output's gradient, and delta (tokens,), the sum of grad_out * out."""
    _, _, token, exists = query
    q0 = _load(q_base, offsets, exists, stride_c, HEAD[0], 0, HEAD[1])
    q1 = q0
    out_offsets = (image * tokens + token) * (heads * HEAD[0]) + head * HEAD[0]
    do0 = _load(grad_out, out_offsets, exists, 1, HEAD[0], 0, HEAD[1])
    do1 = do0
    o = _load(out, out_offsets, exists, 1, HEAD[0], 0, HEAD[1])
    delta = tl.sum(do0.to(tl.float32) * o.to(tl.float32), 1)
    if HEAD[2] > 0:
        q1 = _load(q_base, offsets, exists, stride_c, HEAD[0], HEAD[1], HEAD[2])
        do1 = _load(grad_out, out_offsets, exists, 1, HEAD[0], HEAD[1], HEAD[2])
        o = _load(out, out_offsets, exists, 1, HEAD[0], HEAD[1], HEAD[2])
        delta += tl.sum(do1.to(tl.float32) * o.to(tl.float32), 1)
    return (q0, q1), (do0, do1), delta


@triton.jit
def _load_keys_and_dp(
    do, k_base, v_base, offsets, is_real, stride_c, k_bias, v_bias,
    HEAD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A tile of keys, and the gradient of the probabilities, do times the transpose of v."""
    k0 = _load_keys(k_base, offsets, is_real, stride_c, k_bias, HEAD[0], 0, HEAD[1], PADDED)
    v = _load_keys(v_base, offsets, is_real, stride_c, v_bias, HEAD[0], 0, HEAD[1], PADDED)
    k1 = k0
    dp = tl.dot(do[0], tl.trans(v))
    if HEAD[2] > 0:
        k1 = _load_keys(
            k_base, offsets, is_real, stride_c, k_bias, HEAD[0], HEAD[1], HEAD[2], PADDED
        )
        v = _load_keys(
            v_base, offsets, is_real, stride_c, v_bias, HEAD[0], HEAD[1], HEAD[2], PADDED
        )
        dp = tl.dot(do[1], tl.trans(v), dp)
    return (k0, k1), dp


@triton.jit
def _add_row_terms(
    d_rel_h, d_term_h, query, tokens, row, column, WINDOW: tl.constexpr, KEYS: tl.constexpr
):
    """Stores the gradients of a tile's row terms, added to those of the tiles to its left."""
    _, _, token, exists = query
    rows = row + tl.arange(0, KEYS[0])
    pointers = d_rel_h + rows.to(tl.int64)[None, :] * tokens + token[:, None]
    mask = exists[:, None] & (rows < WINDOW[0])[None, :]
    if WINDOW[1] > KEYS[1]:
        d_term_h += tl.load(pointers, mask=mask & (column > 0), other=0.0)
    tl.store(pointers, d_term_h, mask=mask)


@triton.jit
def _key_gradient_kernel(
    grad_out,  # (B, h, w, D)
    qkv,  # (B, h, w, 3*D), any strides
    qkv_bias,  # (3*D,) or None
    log_sum_exp, delta,  # (B, heads, h, w) float32
    rel_h, rel_w,  # as `_query_gradient_kernel` wrote them
    grad_qkv,  # (B, h, w, 3*D); its second and last third are written
    grad_padding,  # written, float32: (programs, 2, HEAD_DIM), sums of dk and dv over padding tokens; or None
    stride_b, stride_y, stride_x, stride_c,  # of qkv
    h, w, heads, tiles, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTIAL: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = (WINDOW_H, WINDOW_W)
    KEYS: tl.constexpr = (ROWS, COLUMNS)
    tile, head, image, window = _locate(tiles, heads, h, w, WINDOW, PARTIAL)
    top, left, height, width = window
    ACROSS: tl.constexpr = (WINDOW_W + COLUMNS - 1) // COLUMNS
    row = tile // ACROSS * ROWS
    column = tile % ACROSS * COLUMNS
    if not PADDED:  # noqa: SIM102, one is for the compiler and one for the program
        if (row >= height) | (column >= width):
            return
    key_y, key_x, is_real = _key_tile(row, column, window, KEYS)
    tokens = h * w
    channels = heads * HEAD_DIM
    q_base, k_base, v_base = _head_pointers(qkv, image, head, heads, stride_b, stride_c, HEAD_DIM)
    k_bias = qkv_bias
    v_bias = qkv_bias
    if qkv_bias is not None:
        k_bias = qkv_bias + channels + head * HEAD_DIM
        v_bias = k_bias + channels
    offsets = _offsets(window, key_y, key_x, stride_y, stride_x)
    k0 = _load_keys(k_base, offsets, is_real, stride_c, k_bias, HEAD_DIM, 0, D0, PADDED)
    v0 = _load_keys(v_base, offsets, is_real, stride_c, v_bias, HEAD_DIM, 0, D0, PADDED)
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = _load_keys(k_base, offsets, is_real, stride_c, k_bias, HEAD_DIM, D0, D1, PADDED)
        v1 = _load_keys(v_base, offsets, is_real, stride_c, v_bias, HEAD_DIM, D0, D1, PADDED)

    plane = image * heads + head
    rel_h += plane * WINDOW_H * tokens
    rel_w += plane * tokens * WINDOW_W
    dk0 = tl.zeros([ROWS * COLUMNS, D0], tl.float32)
    dv0 = tl.zeros([ROWS * COLUMNS, D0], tl.float32)
    dk1 = tl.zeros([ROWS * COLUMNS, D1 if D1 > 0 else 1], tl.float32)
    dv1 = tl.zeros([ROWS * COLUMNS, D1 if D1 > 0 else 1], tl.float32)
    # Rows of out-of-range keys hold anything, infinity included; they are not stored.
    for query_tile in range(0, tl.cdiv(height * width, BLOCK)):
        query = _query_tile(query_tile, window, w, BLOCK)
        y, x, token, exists = query
        query_offsets = _offsets(window, y, x, stride_y, stride_x)
        out_offsets = (image * tokens + token) * channels + head * HEAD_DIM
        q0 = _load(q_base, query_offsets, exists, stride_c, HEAD_DIM, 0, D0)
        do0 = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, 0, D0)
        q1 = q0
        do1 = do0
        dp = tl.dot(v0, tl.trans(do0))
        if D1 > 0:
            q1 = _load(q_base, query_offsets, exists, stride_c, HEAD_DIM, D0, D1)
            do1 = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, D0, D1)
            dp = tl.dot(v1, tl.trans(do1), dp)
        term_h = _terms_of_rows(rel_h, query, tokens, row, WINDOW_H, ROWS)
        terms = tl.trans(_terms_of_columns(rel_w, query, column, WINDOW_W, COLUMNS))
        # Out-of-range queries get zero probability.
        lse = tl.load(log_sum_exp + plane * tokens + token, mask=exists, other=float("inf")) * LOG2E
        if ROWS == 1:  # the row term of a query is one number
            shift = (lse - tl.sum(term_h, 1))[None, :]
        else:
            terms = (tl.trans(term_h) - lse[None, :])[:, None, :] + terms[None, :, :]
            terms = tl.reshape(terms, [ROWS * COLUMNS, BLOCK])
            shift = 0.0
        scores = _scores((k0, k1), (q0, q1), terms, scale * LOG2E, D1)
        delta_i = tl.load(delta + plane * tokens + token, mask=exists, other=0.0)
        p = tl.exp2(scores - shift)
        ds = (p * (dp - delta_i[None, :])).to(q0.dtype)
        p = p.to(do0.dtype)
        dv0 = tl.dot(p, do0, dv0)
        dk0 = tl.dot(ds, q0, dk0)
        if D1 > 0:
            dv1 = tl.dot(p, do1, dv1)
            dk1 = tl.dot(ds, q1, dk1)

    key_token = (top + key_y) * w + left + key_x
    offsets = (image * tokens + key_token) * (3 * channels) + head * HEAD_DIM + channels
    _store(grad_qkv, offsets, is_real, dk0 * scale, HEAD_DIM, 0, D0)
    _store(grad_qkv, offsets + channels, is_real, dv0, HEAD_DIM, 0, D0)
    if D1 > 0:
        _store(grad_qkv, offsets, is_real, dk1 * scale, HEAD_DIM, D0, D1)
        _store(grad_qkv, offsets + channels, is_real, dv1, HEAD_DIM, D0, D1)
    if PADDED and grad_padding is not None:
        is_padding = (key_y < WINDOW_H) & (key_x < WINDOW_W) & (is_real == 0)
        grad_padding += tl.program_id(0).to(tl.int64) * 2 * HEAD_DIM
        _store_padding(grad_padding, dk0 * scale, is_padding, HEAD_DIM, 0, D0)
        _store_padding(grad_padding + HEAD_DIM, dv0, is_padding, HEAD_DIM, 0, D0)
        if D1 > 0:
            _store_padding(grad_padding, dk1 * scale, is_padding, HEAD_DIM, D0, D1)
            _store_padding(grad_padding + HEAD_DIM, dv1, is_padding, HEAD_DIM, D0, D1)


@triton.jit
def _store_padding(
    pointer, gradient, is_padding,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Stores the sum of a gradient (tokens, SIZE) over the padding tokens."""
    channel = FIRST + tl.arange(0, SIZE)
    total = tl.sum(tl.where(is_padding[:, None], gradient, 0.0), 0)
    tl.store(pointer + channel, total, mask=channel < HEAD_DIM)
