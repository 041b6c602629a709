"""The backward of `rel_pos_attention`: nothing is added by two programs, so every sum has a fixed order.

`_query_gradient_kernel`, one program per tile of queries, gives dq and the gradients of the relative terms;
`_key_gradient_kernel`, one per tile of keys, gives dk and dv; `_table_gradient_kernel` sums over tokens.
"""

import triton
import triton.language as tl

from refsam_kernels.rel_pos_attention.triton.tiles import (
    _add_relative,
    _key_positions,
    _load,
    _load_keys,
    _locate,
    _query_positions,
    _scores,
    _skewed,
    _store,
    _store_relative,
    _terms_of_columns,
    _terms_of_rows,
    _wide,
)


@triton.jit
def _query_gradient_kernel(
    grad_out,
    out,  # (B, h, w, D)
    qkv,  # (B, h, w, 3*D), any strides
    qkv_bias,  # (3*D,) or None
    table_h,
    table_w,  # (2*WINDOW_H-1, HEAD_DIM), (2*WINDOW_W-1, HEAD_DIM)
    log_sum_exp,  # (B, heads, h, w) float32
    grad_qkv,  # (B, h, w, 3*D); its first third is written
    rel_h,
    rel_w,  # written, float32: (B, heads, WINDOW_H, h*w), (B, heads, h*w, WINDOW_W)
    d_rel_h,
    d_rel_w,  # written, likewise: gradients of the relative terms
    delta,  # written, float32: (B, heads, h, w), sum of grad_out * out
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
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTIAL: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,  # as in the forward
):
    tl.static_assert(MASKED or (WINDOW_H % ROWS == 0 and WINDOW_W % COLUMNS == 0))
    tl.static_assert(MASKED or PADDED or not PARTIAL)
    tile, head, image, top, left, height, width = _locate(tiles, heads, h, w, WINDOW_H, WINDOW_W)
    if tile * BLOCK >= height * width:
        return
    y, x, exists = _query_positions(tile, height, width, BLOCK)
    token = (top + y) * w + left + x
    tokens = h * w
    channels = heads * HEAD_DIM
    q_base = qkv + image * stride_b + head.to(tl.int64) * HEAD_DIM * stride_c
    k_base = q_base + _wide(channels) * stride_c
    v_base = k_base + _wide(channels) * stride_c
    offsets = (top + y).to(tl.int64) * stride_y + (left + x).to(tl.int64) * stride_x
    q = _load(q_base, offsets, exists, stride_c, HEAD_DIM, 0, HEAD)
    q_tail = q
    out_offsets = (image * tokens + token) * channels + head * HEAD_DIM
    grad = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, 0, HEAD)
    grad_tail = grad
    result = _load(out, out_offsets, exists, 1, HEAD_DIM, 0, HEAD)
    delta_i = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    if TAIL > 0:
        q_tail = _load(q_base, offsets, exists, stride_c, HEAD_DIM, HEAD, TAIL)
        grad_tail = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, HEAD, TAIL)
        result = _load(out, out_offsets, exists, 1, HEAD_DIM, HEAD, TAIL)
        delta_i += tl.sum(grad_tail.to(tl.float32) * result.to(tl.float32), 1)

    plane = image * heads + head
    tl.store(delta + plane * tokens + token, delta_i, mask=exists)
    # Of a query that does not exist every probability is zero.
    statistic = tl.load(log_sum_exp + plane * tokens + token, mask=exists, other=float("inf"))
    rel_h += plane * WINDOW_H * tokens
    rel_w += plane * tokens * WINDOW_W
    d_rel_h += plane * WINDOW_H * tokens
    d_rel_w += plane * tokens * WINDOW_W
    _store_relative(
        q,
        q_tail,
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
        HEAD,
        TAIL,
        CHUNK,
    )

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
    dq = tl.zeros([BLOCK, HEAD], tl.float32)
    dq_tail = tl.zeros([BLOCK, TAIL if TAIL > 0 else 1], tl.float32)
    for column in range(0, key_width, COLUMNS):
        tl.debug_barrier()  # other threads of this program read what was stored
        columns = column + tl.arange(0, COLUMNS)
        term_w = _terms_of_columns(rel_w, token, exists, column, WINDOW_W, COLUMNS)
        d_term_w = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for row in range(0, key_height, ROWS):
            key_y, key_x = _key_positions(row, column, ROWS, COLUMNS)
            is_real = (key_y < height) & (key_x < width)
            key_offsets = (top + key_y).to(tl.int64) * stride_y
            key_offsets += (left + key_x).to(tl.int64) * stride_x
            k = _load_keys(
                k_base, key_offsets, is_real, stride_c, k_bias, HEAD_DIM, 0, HEAD, PADDED
            )
            v = _load_keys(
                v_base, key_offsets, is_real, stride_c, v_bias, HEAD_DIM, 0, HEAD, PADDED
            )
            k_tail = k
            on_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
            if TAIL > 0:
                k_tail = _load_keys(
                    k_base, key_offsets, is_real, stride_c, k_bias, HEAD_DIM, HEAD, TAIL, PADDED
                )
                v = _load_keys(
                    v_base, key_offsets, is_real, stride_c, v_bias, HEAD_DIM, HEAD, TAIL, PADDED
                )
                on_weights = tl.dot(grad_tail, tl.trans(v), on_weights, input_precision="ieee")
            term_h = _terms_of_rows(rel_h, token, exists, tokens, row, WINDOW_H, ROWS)
            terms = tl.reshape(term_h[:, :, None] + term_w[:, None, :], [BLOCK, ROWS * COLUMNS])
            scores = _scores(q, q_tail, k, k_tail, terms, scale, TAIL)
            if MASKED:
                is_key = (key_y < key_height) & (key_x < key_width)
                scores = tl.where(is_key[None, :], scores, float("-inf"))
            weights = tl.exp(scores - statistic[:, None])
            on_scores = weights * (on_weights - delta_i[:, None])
            on_terms = tl.reshape(on_scores, [BLOCK, ROWS, COLUMNS])
            d_term_w += tl.sum(on_terms, 1)
            d_term_h = tl.sum(on_terms, 2)
            rows = row + tl.arange(0, ROWS)
            pointers = d_rel_h + rows.to(tl.int64)[None, :] * tokens + token[:, None]
            mask = exists[:, None] & (rows < WINDOW_H)[None, :]
            if WINDOW_W > COLUMNS:  # a sum over several tiles
                d_term_h += tl.load(pointers, mask=mask & (column > 0), other=0.0)
            tl.store(pointers, d_term_h, mask=mask)
            on_scores = on_scores.to(k.dtype)
            dq = tl.dot(on_scores, k, dq, input_precision="ieee")
            if TAIL > 0:
                dq_tail = tl.dot(on_scores, k_tail, dq_tail, input_precision="ieee")
        pointers = d_rel_w + token.to(tl.int64)[:, None] * WINDOW_W + columns[None, :]
        tl.store(pointers, d_term_w, mask=exists[:, None] & (columns < WINDOW_W)[None, :])

    tl.debug_barrier()
    offsets = (image * tokens + token) * (3 * channels) + head * HEAD_DIM
    dq = _add_relative(
        dq * scale,
        table_h,
        table_w,
        d_rel_h,
        d_rel_w,
        y,
        x,
        exists,
        token,
        tokens,
        WINDOW_H,
        WINDOW_W,
        HEAD_DIM,
        0,
        HEAD,
        CHUNK,
    )
    _store(grad_qkv, offsets, exists, dq, HEAD_DIM, 0, HEAD)
    if TAIL > 0:
        dq_tail = _add_relative(
            dq_tail * scale,
            table_h,
            table_w,
            d_rel_h,
            d_rel_w,
            y,
            x,
            exists,
            token,
            tokens,
            WINDOW_H,
            WINDOW_W,
            HEAD_DIM,
            HEAD,
            TAIL,
            CHUNK,
        )
        _store(grad_qkv, offsets, exists, dq_tail, HEAD_DIM, HEAD, TAIL)


@triton.jit
def _key_gradient_kernel(
    grad_out,  # (B, h, w, D)
    qkv,  # (B, h, w, 3*D), any strides
    qkv_bias,  # (3*D,) or None
    log_sum_exp,
    delta,  # (B, heads, h, w) float32
    rel_h,
    rel_w,  # as `_query_gradient_kernel` wrote them
    grad_qkv,  # (B, h, w, 3*D); its second and last third are written
    grad_padding,  # written, float32: (programs, 2, HEAD_DIM), sums of dk and dv over padding tokens; or None
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
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    tile, head, image, top, left, height, width = _locate(tiles, heads, h, w, WINDOW_H, WINDOW_W)
    ACROSS: tl.constexpr = (WINDOW_W + COLUMNS - 1) // COLUMNS
    row = tile // ACROSS * ROWS
    column = tile % ACROSS * COLUMNS
    if not PADDED:  # noqa: SIM102, one is for the compiler and one for the program
        if (row >= height) | (column >= width):
            return
    key_y, key_x = _key_positions(row, column, ROWS, COLUMNS)
    is_real = (key_y < height) & (key_x < width)
    tokens = h * w
    channels = heads * HEAD_DIM
    q_base = qkv + image * stride_b + head.to(tl.int64) * HEAD_DIM * stride_c
    k_base = q_base + _wide(channels) * stride_c
    v_base = k_base + _wide(channels) * stride_c
    k_bias = qkv_bias
    v_bias = qkv_bias
    if qkv_bias is not None:
        k_bias = qkv_bias + channels + head * HEAD_DIM
        v_bias = k_bias + channels
    offsets = (top + key_y).to(tl.int64) * stride_y + (left + key_x).to(tl.int64) * stride_x
    k = _load_keys(k_base, offsets, is_real, stride_c, k_bias, HEAD_DIM, 0, HEAD, PADDED)
    v = _load_keys(v_base, offsets, is_real, stride_c, v_bias, HEAD_DIM, 0, HEAD, PADDED)
    k_tail = k
    v_tail = v
    if TAIL > 0:
        k_tail = _load_keys(
            k_base, offsets, is_real, stride_c, k_bias, HEAD_DIM, HEAD, TAIL, PADDED
        )
        v_tail = _load_keys(
            v_base, offsets, is_real, stride_c, v_bias, HEAD_DIM, HEAD, TAIL, PADDED
        )

    plane = image * heads + head
    rel_h += plane * WINDOW_H * tokens
    rel_w += plane * tokens * WINDOW_W
    dk = tl.zeros([ROWS * COLUMNS, HEAD], tl.float32)
    dv = tl.zeros([ROWS * COLUMNS, HEAD], tl.float32)
    dk_tail = tl.zeros([ROWS * COLUMNS, TAIL if TAIL > 0 else 1], tl.float32)
    dv_tail = tl.zeros([ROWS * COLUMNS, TAIL if TAIL > 0 else 1], tl.float32)
    # A row of a key that does not exist holds anything, infinity included; it is not stored.
    for query_tile in range(0, tl.cdiv(height * width, BLOCK)):
        y, x, exists = _query_positions(query_tile, height, width, BLOCK)
        token = (top + y) * w + left + x
        query_offsets = (top + y).to(tl.int64) * stride_y + (left + x).to(tl.int64) * stride_x
        out_offsets = (image * tokens + token) * channels + head * HEAD_DIM
        q = _load(q_base, query_offsets, exists, stride_c, HEAD_DIM, 0, HEAD)
        grad = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, 0, HEAD)
        q_tail = q
        grad_tail = grad
        on_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        if TAIL > 0:
            q_tail = _load(q_base, query_offsets, exists, stride_c, HEAD_DIM, HEAD, TAIL)
            grad_tail = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, HEAD, TAIL)
            on_weights = tl.dot(v_tail, tl.trans(grad_tail), on_weights, input_precision="ieee")
        term_h = tl.trans(_terms_of_rows(rel_h, token, exists, tokens, row, WINDOW_H, ROWS))
        term_w = tl.trans(_terms_of_columns(rel_w, token, exists, column, WINDOW_W, COLUMNS))
        terms = tl.reshape(term_h[:, None, :] + term_w[None, :, :], [ROWS * COLUMNS, BLOCK])
        scores = _scores(k, k_tail, q, q_tail, terms, scale, TAIL)
        # Of a query that does not exist every probability is zero.
        statistic = tl.load(log_sum_exp + plane * tokens + token, mask=exists, other=float("inf"))
        delta_i = tl.load(delta + plane * tokens + token, mask=exists, other=0.0)
        weights = tl.exp(scores - statistic[None, :])
        on_scores = (weights * (on_weights - delta_i[None, :])).to(q.dtype)
        weights = weights.to(grad.dtype)
        dv = tl.dot(weights, grad, dv, input_precision="ieee")
        dk = tl.dot(on_scores, q, dk, input_precision="ieee")
        if TAIL > 0:
            dv_tail = tl.dot(weights, grad_tail, dv_tail, input_precision="ieee")
            dk_tail = tl.dot(on_scores, q_tail, dk_tail, input_precision="ieee")

    key_token = (top + key_y) * w + left + key_x
    offsets = (image * tokens + key_token) * (3 * channels) + head * HEAD_DIM + channels
    _store(grad_qkv, offsets, is_real, dk * scale, HEAD_DIM, 0, HEAD)
    _store(grad_qkv, offsets + channels, is_real, dv, HEAD_DIM, 0, HEAD)
    if TAIL > 0:
        _store(grad_qkv, offsets, is_real, dk_tail * scale, HEAD_DIM, HEAD, TAIL)
        _store(grad_qkv, offsets + channels, is_real, dv_tail, HEAD_DIM, HEAD, TAIL)
    if PADDED and grad_padding is not None:
        is_padding = (key_y < WINDOW_H) & (key_x < WINDOW_W) & (is_real == 0)
        grad_padding += tl.program_id(0).to(tl.int64) * 2 * HEAD_DIM
        _store_padding(grad_padding, dk * scale, is_padding, HEAD_DIM, 0, HEAD)
        _store_padding(grad_padding + HEAD_DIM, dv, is_padding, HEAD_DIM, 0, HEAD)
        if TAIL > 0:
            _store_padding(grad_padding, dk_tail * scale, is_padding, HEAD_DIM, HEAD, TAIL)
            _store_padding(grad_padding + HEAD_DIM, dv_tail, is_padding, HEAD_DIM, HEAD, TAIL)


@triton.jit
def _store_padding(
    pointer,
    gradient,
    is_padding,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Stores the sum of a gradient (tokens, SIZE) over the padding tokens."""
    channel = FIRST + tl.arange(0, SIZE)
    total = tl.sum(tl.where(is_padding[:, None], gradient, 0.0), 0)
    tl.store(pointer + channel, total, mask=channel < HEAD_DIM)


@triton.jit
def _table_gradient_kernel(
    qkv,  # (B, h, w, 3*D), any strides
    d_rel,  # float32, as `_query_gradient_kernel` wrote it
    parts,  # written, float32: (splits, 2*SIZE-1, HEAD_DIM)
    stride_b,
    stride_y,
    stride_x,
    stride_c,  # of qkv
    key_stride,
    token_stride,  # of d_rel
    h,
    w,
    heads,
    tiles,
    tiles_each,
    tiles_in_all,
    SIZE: tl.constexpr,  # of a window along the table's axis
    OF_ROWS: tl.constexpr,  # which axis that is
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums d_rel * q over the tokens of some tiles, all images and heads counted through, for CHUNK rows of a table."""
    split = tl.program_id(0)
    first = tl.program_id(1) * CHUNK
    tokens = h * w
    total = tl.zeros([CHUNK, HEAD], tl.float32)
    total_tail = tl.zeros([CHUNK, TAIL if TAIL > 0 else 1], tl.float32)
    last = tl.minimum((split + 1) * tiles_each, tiles_in_all)
    for tile in range(split * tiles_each, last):
        plane = (tile // tiles).to(tl.int64)
        token = tile % tiles * BLOCK + tl.arange(0, BLOCK)
        exists = token < tokens
        y = token // w
        x = token % w
        position = (y if OF_ROWS else x) % SIZE
        pointers, mask = _skewed(
            position,
            exists,
            first,
            d_rel + plane * tokens * SIZE,
            token,
            key_stride,
            token_stride,
            SIZE,
            CHUNK,
        )
        gradient = tl.load(pointers, mask=mask, other=0.0).to(qkv.dtype.element_ty)
        base = qkv + plane // heads * stride_b + plane % heads * HEAD_DIM * stride_c
        offsets = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        q = _load(base, offsets, exists, stride_c, HEAD_DIM, 0, HEAD)
        total = tl.dot(tl.trans(gradient), q, total, input_precision="ieee")
        if TAIL > 0:
            q = _load(base, offsets, exists, stride_c, HEAD_DIM, HEAD, TAIL)
            total_tail = tl.dot(tl.trans(gradient), q, total_tail, input_precision="ieee")
    row = first + tl.arange(0, CHUNK)
    offsets = (split.to(tl.int64) * (2 * SIZE - 1) + row) * HEAD_DIM
    in_table = row < 2 * SIZE - 1
    _store(parts, offsets, in_table, total, HEAD_DIM, 0, HEAD)
    if TAIL > 0:
        _store(parts, offsets, in_table, total_tail, HEAD_DIM, HEAD, TAIL)
