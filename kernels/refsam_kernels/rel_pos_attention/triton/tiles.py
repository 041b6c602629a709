"""What the Triton kernels of `rel_pos_attention` share: where tokens lie, tiles of them, relative terms.

A tile of keys is ROWS x COLUMNS positions of a window, so the terms of both axes are small tiles that
are broadcast over it. Relative terms pass through scratch memory: `rel_h` (image, head, key row,
token) and `rel_w` (image, head, token, key column), float32. A head's channels
are split into D0 and D1, both powers of two (80 = 64 + 16), so that nothing is padded to 128.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(tiles, heads, h, w, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Of this program: tile, head, image, the window's first token, its numbers of real rows and columns."""
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    window = program // tiles // heads
    across = tl.cdiv(w, WINDOW_W)
    down = tl.cdiv(h, WINDOW_H)
    left = window % across * WINDOW_W
    top = window // across % down * WINDOW_H
    image = (window // across // down).to(tl.int64)
    return (
        tile,
        head,
        image,
        top,
        left,
        tl.minimum(h - top, WINDOW_H),
        tl.minimum(w - left, WINDOW_W),
    )


@triton.jit
def _wide(number):
    """A number as 64 bits, also where a launch has made it a constant."""
    return tl.full([], number, tl.int64)


@triton.jit
def _query_positions(tile, height, width, BLOCK: tl.constexpr):
    """Row and column in the window of a tile of its real tokens, row by row, and which of them exist."""
    index = tile * BLOCK + tl.arange(0, BLOCK)
    return index // width, index % width, index < height * width


@triton.jit
def _key_positions(row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column in the window of a tile of keys that begins at (row, column)."""
    index = tl.arange(0, ROWS * COLUMNS)
    return row + index // COLUMNS, column + index % COLUMNS


@triton.jit
def _load(
    pointer,
    offsets,
    exists,
    stride,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Channels FIRST to FIRST + SIZE of tokens at `offsets`: (tokens, SIZE), zero where there are none."""
    channel = FIRST + tl.arange(0, SIZE)
    mask = exists[:, None]
    if FIRST + SIZE > HEAD_DIM:
        mask = mask & (channel < HEAD_DIM)[None, :]
    return tl.load(pointer + offsets[:, None] + channel[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def _store(
    pointer,
    offsets,
    exists,
    values,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Stores channels FIRST to FIRST + SIZE of tokens where they lie side by side."""
    channel = FIRST + tl.arange(0, SIZE)
    mask = exists[:, None]
    if FIRST + SIZE > HEAD_DIM:
        mask = mask & (channel < HEAD_DIM)[None, :]
    values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets[:, None] + channel[None, :], values, mask=mask)


@triton.jit
def _load_keys(
    pointer,
    offsets,
    is_real,
    stride,
    bias,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Keys or values (tokens, SIZE); those of padding tokens are the bias."""
    keys = _load(pointer, offsets, is_real, stride, HEAD_DIM, FIRST, SIZE)
    if PADDED and bias is not None:
        channel = FIRST + tl.arange(0, SIZE)
        padding = tl.load(bias + channel, mask=channel < HEAD_DIM, other=0.0)
        keys = tl.where(is_real[:, None], keys, padding[None, :])
    return keys


@triton.jit
def _skewed(
    position,
    exists,
    first,
    rel,
    token,
    key_stride,
    token_stride,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Where products of tokens with CHUNK table rows lie in `rel`: row i belongs to key position - i + SIZE - 1."""
    row = first + tl.arange(0, CHUNK)
    key = position[:, None] + (SIZE - 1) - row[None, :]
    pointers = rel + key.to(tl.int64) * key_stride + (token.to(tl.int64) * token_stride)[:, None]
    return pointers, exists[:, None] & (key >= 0) & (key < SIZE)


@triton.jit
def _store_relative_axis(
    q0,
    q1,
    table,
    rel,
    position,
    exists,
    token,
    key_stride,
    token_stride,
    SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stores one axis' relative terms of the queries with all SIZE keys of the axis."""
    for first in tl.range(0, 2 * SIZE - 1, CHUNK, num_stages=1):
        row = first + tl.arange(0, CHUNK)
        offsets = row * HEAD_DIM
        in_table = row < 2 * SIZE - 1
        rows = _load(table, offsets, in_table, 1, HEAD_DIM, 0, D0)
        product = tl.dot(q0, tl.trans(rows), input_precision="ieee")
        if D1 > 0:
            rows = _load(table, offsets, in_table, 1, HEAD_DIM, D0, D1)
            product = tl.dot(q1, tl.trans(rows), product, input_precision="ieee")
        pointers, mask = _skewed(
            position, exists, first, rel, token, key_stride, token_stride, SIZE, CHUNK
        )
        tl.store(pointers, product, mask=mask)


@triton.jit
def _add_relative_axis(
    dq,
    table,
    d_rel,
    position,
    exists,
    token,
    key_stride,
    token_stride,
    SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds to `dq` (tokens, CHANNELS) what flows back through one axis' relative terms."""
    for first in tl.range(0, 2 * SIZE - 1, CHUNK, num_stages=1):
        row = first + tl.arange(0, CHUNK)
        rows = _load(table, row * HEAD_DIM, row < 2 * SIZE - 1, 1, HEAD_DIM, FIRST, CHANNELS)
        pointers, mask = _skewed(
            position, exists, first, d_rel, token, key_stride, token_stride, SIZE, CHUNK
        )
        gradient = tl.load(pointers, mask=mask, other=0.0)
        dq = tl.dot(gradient.to(rows.dtype), rows, dq, input_precision="ieee")
    return dq


@triton.jit
def _store_relative(
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
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stores the relative terms of the queries with all keys of both axes."""
    _store_relative_axis(
        q0,
        q1,
        table_h,
        rel_h,
        y,
        exists,
        token,
        tokens,
        1,
        WINDOW_H,
        HEAD_DIM,
        D0,
        D1,
        CHUNK,
    )
    _store_relative_axis(
        q0,
        q1,
        table_w,
        rel_w,
        x,
        exists,
        token,
        1,
        WINDOW_W,
        WINDOW_W,
        HEAD_DIM,
        D0,
        D1,
        CHUNK,
    )


@triton.jit
def _add_relative(
    dq,
    table_h,
    table_w,
    d_rel_h,
    d_rel_w,
    y,
    x,
    exists,
    token,
    tokens,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds to `dq` (tokens, CHANNELS) what flows back through the relative terms of both axes."""
    dq = _add_relative_axis(
        dq,
        table_h,
        d_rel_h,
        y,
        exists,
        token,
        tokens,
        1,
        WINDOW_H,
        HEAD_DIM,
        FIRST,
        CHANNELS,
        CHUNK,
    )
    return _add_relative_axis(
        dq,
        table_w,
        d_rel_w,
        x,
        exists,
        token,
        1,
        WINDOW_W,
        WINDOW_W,
        HEAD_DIM,
        FIRST,
        CHANNELS,
        CHUNK,
    )


@triton.jit
def _scores(q0, q1, k0, k1, terms, scale, D1: tl.constexpr):
    """Logits (queries, keys)."""
    scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    return scores * scale + terms


@triton.jit
def _terms_of_columns(rel_w, token, exists, column, WINDOW_W: tl.constexpr, COLUMNS: tl.constexpr):
    """The relative terms (tokens, COLUMNS) of key columns from `column` on."""
    columns = column + tl.arange(0, COLUMNS)
    pointers = rel_w + token.to(tl.int64)[:, None] * WINDOW_W + columns[None, :]
    return tl.load(pointers, mask=exists[:, None] & (columns < WINDOW_W)[None, :], other=0.0)


@triton.jit
def _terms_of_rows(rel_h, token, exists, tokens, row, WINDOW_H: tl.constexpr, ROWS: tl.constexpr):
    """The relative terms (tokens, ROWS) of key rows from `row` on."""
    rows = row + tl.arange(0, ROWS)
    pointers = rel_h + rows.to(tl.int64)[None, :] * tokens + token[:, None]
    return tl.load(pointers, mask=exists[:, None] & (rows < WINDOW_H)[None, :], other=0.0)
