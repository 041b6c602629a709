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
    D0: tl.constexpr,
    D1: tl.constexpr,
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
    q0 = _load(q_base, offsets, exists, stride_c, HEAD_DIM, 0, D0)
    q1 = q0
    out_offsets = (image * tokens + token) * channels + head * HEAD_DIM
    do0 = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, 0, D0)
    do1 = do0
    o = _load(out, out_offsets, exists, 1, HEAD_DIM, 0, D0)
    delta_i = tl.sum(do0.to(tl.float32) * o.to(tl.float32), 1)
    if D1 > 0:
        q1 = _load(q_base, offsets, exists, stride_c, HEAD_DIM, D0, D1)
        do1 = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, D0, D1)
        o = _load(out, out_offsets, exists, 1, HEAD_DIM, D0, D1)
        delta_i += tl.sum(do1.to(tl.float32) * o.to(tl.float32), 1)

    plane = image * heads + head
    tl.store(delta + plane * tokens + token, delta_i, mask=exists)
    # Out-of-range queries get zero probability.
    lse = tl.load(log_sum_exp + plane * tokens + token, mask=exists, other=float("inf"))
    rel_h += plane * WINDOW_H * tokens
    rel_w += plane * tokens * WINDOW_W
    d_rel_h += plane * WINDOW_H * tokens
    d_rel_w += plane * tokens * WINDOW_W
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
    dq0 = tl.zeros([BLOCK, D0], tl.float32)
    dq1 = tl.zeros([BLOCK, D1 if D1 > 0 else 1], tl.float32)
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
            k0 = _load_keys(k_base, key_offsets, is_real, stride_c, k_bias, HEAD_DIM, 0, D0, PADDED)
            v = _load_keys(v_base, key_offsets, is_real, stride_c, v_bias, HEAD_DIM, 0, D0, PADDED)
            k1 = k0
            dp = tl.dot(do0, tl.trans(v), input_precision="ieee")
            if D1 > 0:
                k1 = _load_keys(
                    k_base, key_offsets, is_real, stride_c, k_bias, HEAD_DIM, D0, D1, PADDED
                )
                v = _load_keys(
                    v_base, key_offsets, is_real, stride_c, v_bias, HEAD_DIM, D0, D1, PADDED
                )
                dp = tl.dot(do1, tl.trans(v), dp, input_precision="ieee")
            term_h = _terms_of_rows(rel_h, token, exists, tokens, row, WINDOW_H, ROWS)
            terms = tl.reshape(term_h[:, :, None] + term_w[:, None, :], [BLOCK, ROWS * COLUMNS])
            scores = _scores(q0, q1, k0, k1, terms, scale, D1)
            if MASKED:
                is_key = (key_y < key_height) & (key_x < key_width)
                scores = tl.where(is_key[None, :], scores, float("-inf"))
            p = tl.exp(scores - lse[:, None])
            ds = p * (dp - delta_i[:, None])
            ds_of_tile = tl.reshape(ds, [BLOCK, ROWS, COLUMNS])
            d_term_w += tl.sum(ds_of_tile, 1)
            d_term_h = tl.sum(ds_of_tile, 2)
            rows = row + tl.arange(0, ROWS)
            pointers = d_rel_h + rows.to(tl.int64)[None, :] * tokens + token[:, None]
            mask = exists[:, None] & (rows < WINDOW_H)[None, :]
            if WINDOW_W > COLUMNS:  # a sum over several tiles
                d_term_h += tl.load(pointers, mask=mask & (column > 0), other=0.0)
            tl.store(pointers, d_term_h, mask=mask)
            ds = ds.to(k0.dtype)
            dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
            if D1 > 0:
                dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
        pointers = d_rel_w + token.to(tl.int64)[:, None] * WINDOW_W + columns[None, :]
        tl.store(pointers, d_term_w, mask=exists[:, None] & (columns < WINDOW_W)[None, :])

    tl.debug_barrier()
    offsets = (image * tokens + token) * (3 * channels) + head * HEAD_DIM
    dq0 = _add_relative(
        dq0 * scale,
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
        D0,
        CHUNK,
    )
    _store(grad_qkv, offsets, exists, dq0, HEAD_DIM, 0, D0)
    if D1 > 0:
        dq1 = _add_relative(
            dq1 * scale,
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
            D0,
            D1,
            CHUNK,
        )
        _store(grad_qkv, offsets, exists, dq1, HEAD_DIM, D0, D1)


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
    D0: tl.constexpr,
    D1: tl.constexpr,
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
    # A row of a key that does not exist holds anything, infinity included; it is not stored.
    for query_tile in range(0, tl.cdiv(height * width, BLOCK)):
        y, x, exists = _query_positions(query_tile, height, width, BLOCK)
        token = (top + y) * w + left + x
        query_offsets = (top + y).to(tl.int64) * stride_y + (left + x).to(tl.int64) * stride_x
        out_offsets = (image * tokens + token) * channels + head * HEAD_DIM
        q0 = _load(q_base, query_offsets, exists, stride_c, HEAD_DIM, 0, D0)
        do0 = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, 0, D0)
        q1 = q0
        do1 = do0
        dp = tl.dot(v0, tl.trans(do0), input_precision="ieee")
        if D1 > 0:
            q1 = _load(q_base, query_offsets, exists, stride_c, HEAD_DIM, D0, D1)
            do1 = _load(grad_out, out_offsets, exists, 1, HEAD_DIM, D0, D1)
            dp = tl.dot(v1, tl.trans(do1), dp, input_precision="ieee")
        term_h = tl.trans(_terms_of_rows(rel_h, token, exists, tokens, row, WINDOW_H, ROWS))
        term_w = tl.trans(_terms_of_columns(rel_w, token, exists, column, WINDOW_W, COLUMNS))
        terms = tl.reshape(term_h[:, None, :] + term_w[None, :, :], [ROWS * COLUMNS, BLOCK])
        scores = _scores(k0, k1, q0, q1, terms, scale, D1)
        # Out-of-range queries get zero probability.
        lse = tl.load(log_sum_exp + plane * tokens + token, mask=exists, other=float("inf"))
        delta_i = tl.load(delta + plane * tokens + token, mask=exists, other=0.0)
        p = tl.exp(scores - lse[None, :])
        ds = (p * (dp - delta_i[None, :])).to(q0.dtype)
        p = p.to(do0.dtype)
        dv0 = tl.dot(p, do0, dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(p, do1, dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")

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
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums d_rel * q over the tokens of some tiles, all images and heads counted through, for CHUNK rows of a table."""
    split = tl.program_id(0)
    first = tl.program_id(1) * CHUNK
    tokens = h * w
    acc0 = tl.zeros([CHUNK, D0], tl.float32)
    acc1 = tl.zeros([CHUNK, D1 if D1 > 0 else 1], tl.float32)
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
        q = _load(base, offsets, exists, stride_c, HEAD_DIM, 0, D0)
        acc0 = tl.dot(tl.trans(gradient), q, acc0, input_precision="ieee")
        if D1 > 0:
            q = _load(base, offsets, exists, stride_c, HEAD_DIM, D0, D1)
            acc1 = tl.dot(tl.trans(gradient), q, acc1, input_precision="ieee")
    row = first + tl.arange(0, CHUNK)
    offsets = (split.to(tl.int64) * (2 * SIZE - 1) + row) * HEAD_DIM
    in_table = row < 2 * SIZE - 1
    _store(parts, offsets, in_table, acc0, HEAD_DIM, 0, D0)
    if D1 > 0:
        _store(parts, offsets, in_table, acc1, HEAD_DIM, D0, D1)
