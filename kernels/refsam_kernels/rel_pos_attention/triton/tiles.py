"""Shared by the Triton kernels of `rel_pos_attention`: positions of tokens, tiles of them, relative terms.

A tile of keys is ROWS x COLUMNS positions of a window, so the terms of both axes are small tiles that
are broadcast over it. Relative terms pass through scratch memory: `rel_h` (image, head, key row,
token) and `rel_w` (image, head, token, key column), float32, in units of log2(e). A head's channels
are split into D0 and D1, both powers of two (80 = 64 + 16), so that nothing is padded to 128.

Values that travel together are tuples:

    window = (top, left, height, width)     # first token, real rows and columns
    query = (y, x, token, exists)           # of a tile: row and column in the window, index in the grid, in range
    q = (q0, q1), k, do, ...                # the parts of D0 and D1 channels; q1 is q0 where D1 is 0
    HEAD = (HEAD_DIM, D0, D1); WINDOW = (WINDOW_H, WINDOW_W); KEYS = (ROWS, COLUMNS)
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _check_tile(
    WINDOW: tl.constexpr, KEYS: tl.constexpr,
    PARTIAL: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Refuses, at compile time, a tile that does not fit the window and is not masked."""
    tl.static_assert(MASKED or (WINDOW[0] % KEYS[0] == 0 and WINDOW[1] % KEYS[1] == 0))
    tl.static_assert(MASKED or PADDED or not PARTIAL)


@triton.jit
def _locate(tiles, heads, h, w, WINDOW: tl.constexpr, PARTIAL: tl.constexpr):
    """This program's tile, head, image and window, whose height and width are constants where no window is partial."""
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    index = program // tiles // heads
    across = tl.cdiv(w, WINDOW[1])
    down = tl.cdiv(h, WINDOW[0])
    left = index % across * WINDOW[1]
    top = index // across % down * WINDOW[0]
    image = (index // across // down).to(tl.int64)
    height = tl.minimum(h - top, WINDOW[0]) if PARTIAL else WINDOW[0]
    width = tl.minimum(w - left, WINDOW[1]) if PARTIAL else WINDOW[1]
    return tile, head, image, (top, left, height, width)


@triton.jit
def _wide(number):
    """A number as 64 bits, also where a launch has made it a constant."""
    return tl.full([], number, tl.int64)


@triton.jit
def _head_pointers(qkv, image, head, heads, stride_b, stride_c, HEAD_DIM: tl.constexpr):
    """Pointers to a head's first channel in q, k and v of an image."""
    q = qkv + image * stride_b + head.to(tl.int64) * HEAD_DIM * stride_c
    k = q + _wide(heads * HEAD_DIM) * stride_c
    return q, k, k + _wide(heads * HEAD_DIM) * stride_c


@triton.jit
def _key_grid(window, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """Rows and columns of a window's keys: the real ones, or with padding all."""
    key_height = window[2]
    key_width = window[3]
    if PADDED:
        key_height = WINDOW[0]
        key_width = WINDOW[1]
    return key_height, key_width


@triton.jit
def _offsets(window, y, x, stride_y, stride_x):
    """Offsets in qkv of tokens at (y, x) of a window."""
    top, left, _, _ = window
    return (top + y).to(tl.int64) * stride_y + (left + x).to(tl.int64) * stride_x


@triton.jit
def _query_tile(tile, window, w, BLOCK: tl.constexpr):
    """The query tuple of a tile of a window's real tokens, row by row."""
    top, left, height, width = window
    index = tile * BLOCK + tl.arange(0, BLOCK)
    y = index // width
    x = index % width
    exists = index < height * width
    return y, x, (top + y) * w + left + x, exists


@triton.jit
def _key_tile(row, column, window, KEYS: tl.constexpr):
    """Rows and columns in the window of a tile of keys that begins at (row, column), and which are real tokens."""
    index = tl.arange(0, KEYS[0] * KEYS[1])
    y = row + index // KEYS[1]
    x = column + index % KEYS[1]
    return y, x, (y < window[2]) & (x < window[3])


@triton.jit
def _load(
    pointer, offsets, exists, stride,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Channels FIRST to FIRST + SIZE of tokens at `offsets`: (tokens, SIZE), zero where there are none."""
    channel = FIRST + tl.arange(0, SIZE)
    mask = exists[:, None]
    if FIRST + SIZE > HEAD_DIM:
        mask = mask & (channel < HEAD_DIM)[None, :]
    return tl.load(pointer + offsets[:, None] + channel[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def _store(
    pointer, offsets, exists, values,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Stores channels FIRST to FIRST + SIZE of tokens where they lie side by side."""
    channel = FIRST + tl.arange(0, SIZE)
    mask = exists[:, None]
    if FIRST + SIZE > HEAD_DIM:
        mask = mask & (channel < HEAD_DIM)[None, :]
    values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets[:, None] + channel[None, :], values, mask=mask)


@triton.jit
def _zeros(TOKENS: tl.constexpr, HEAD: tl.constexpr):
    """Accumulators for both parts; a column that nothing uses where there is one part."""
    second: tl.constexpr = HEAD[2] if HEAD[2] > 0 else 1
    return tl.zeros([TOKENS, HEAD[1]], tl.float32), tl.zeros([TOKENS, second], tl.float32)


@triton.jit
def _load_keys(
    pointer, offsets, is_real, stride, bias,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Keys or values (tokens, SIZE); those of padding tokens are the bias.

    The pointer is chosen, not the value: so the copy to shared memory stays asynchronous.
    """
    if PADDED and bias is not None:
        channel = FIRST + tl.arange(0, SIZE)
        pointers = pointer + offsets[:, None] + channel[None, :] * stride
        pointers = tl.where(is_real[:, None], pointers, (bias + channel)[None, :])
        if FIRST + SIZE > HEAD_DIM:
            keys = tl.load(pointers, mask=(channel < HEAD_DIM)[None, :], other=0.0)
        else:
            keys = tl.load(pointers)
    else:
        keys = _load(pointer, offsets, is_real, stride, HEAD_DIM, FIRST, SIZE)
    return keys


@triton.jit
def _skewed(
    position, exists, first, rel, token, key_stride, token_stride,
    SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Pointers into `rel` for products of tokens with CHUNK table rows: row i belongs to key position - i + SIZE - 1.

    A plane of `rel` has less than 2^31 elements, so 32 bits suffice, and half the registers.
    """
    row = first + tl.arange(0, CHUNK)
    key = position[:, None] + (SIZE - 1) - row[None, :]
    pointers = rel + (key * key_stride + (token * token_stride)[:, None])
    return pointers, exists[:, None] & (key >= 0) & (key < SIZE)


@triton.jit
def _store_relative_axis(
    q, table, rel, position, query, key_stride, token_stride,
    SIZE: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Stores one axis' relative terms of the queries with all SIZE keys of the axis, in units of log2(e)."""
    _, _, token, exists = query
    for first in tl.range(0, 2 * SIZE - 1, CHUNK, num_stages=1):
        row = first + tl.arange(0, CHUNK)
        offsets = row * HEAD[0]
        in_table = row < 2 * SIZE - 1
        rows = _load(table, offsets, in_table, 1, HEAD[0], 0, HEAD[1])
        product = tl.dot(q[0], tl.trans(rows))
        if HEAD[2] > 0:
            rows = _load(table, offsets, in_table, 1, HEAD[0], HEAD[1], HEAD[2])
            product = tl.dot(q[1], tl.trans(rows), product)
        pointers, mask = _skewed(
            position, exists, first, rel, token, key_stride, token_stride, SIZE, CHUNK
        )
        tl.store(pointers, product * LOG2E, mask=mask)


@triton.jit
def _store_relative(
    q, tables, rel, query, tokens, WINDOW: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr
):
    """Stores the relative terms of the queries with all keys of both axes."""
    table_h, table_w = tables
    rel_h, rel_w = rel
    y, x, _, _ = query
    H: tl.constexpr = WINDOW[0]
    W: tl.constexpr = WINDOW[1]
    _store_relative_axis(q, table_h, rel_h, y, query, tokens, 1, H, HEAD, CHUNK)
    _store_relative_axis(q, table_w, rel_w, x, query, 1, W, W, HEAD, CHUNK)


@triton.jit
def _add_relative_axis(
    dq, table, d_rel, position, query, key_stride, token_stride,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds to `dq` (tokens, CHANNELS) the gradient through one axis' relative terms."""
    _, _, token, exists = query
    for first in tl.range(0, 2 * SIZE - 1, CHUNK, num_stages=1):
        row = first + tl.arange(0, CHUNK)
        rows = _load(table, row * HEAD_DIM, row < 2 * SIZE - 1, 1, HEAD_DIM, FIRST, CHANNELS)
        pointers, mask = _skewed(
            position, exists, first, d_rel, token, key_stride, token_stride, SIZE, CHUNK
        )
        gradient = tl.load(pointers, mask=mask, other=0.0)
        dq = tl.dot(gradient.to(rows.dtype), rows, dq)
    return dq


@triton.jit
def _add_relative(
    dq, tables, d_rel, query, tokens,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds to `dq` (tokens, SIZE), channels from FIRST on, the gradient through the relative terms of both axes."""
    table_h, table_w = tables
    d_rel_h, d_rel_w = d_rel
    y, x, _, _ = query
    H: tl.constexpr = WINDOW[0]
    W: tl.constexpr = WINDOW[1]
    dq = _add_relative_axis(
        dq, table_h, d_rel_h, y, query, tokens, 1, H, HEAD_DIM, FIRST, SIZE, CHUNK
    )
    return _add_relative_axis(dq, table_w, d_rel_w, x, query, 1, W, W, HEAD_DIM, FIRST, SIZE, CHUNK)


@triton.jit
def _scores(q, k, terms, scale, D1: tl.constexpr):
    """Logits (queries, keys), in the units of scale and terms."""
    scores = tl.dot(q[0], tl.trans(k[0]))
    if D1 > 0:
        scores = tl.dot(q[1], tl.trans(k[1]), scores)
    return scores * scale + terms


@triton.jit
def _query_scores(
    q, k, rel_h, term_w, query, tokens, row, scale,
    WINDOW_H: tl.constexpr, D1: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Logits (queries, keys) of a tile of keys from `row` on, and a number for each query to be added to its logits.

    They are in units of log2(e), as `scale` and the terms are: `exp2` follows. A tile of one row leaves its row term to
    that number, which saves an addition for every logit.
    """
    term_h = _terms_of_rows(rel_h, query, tokens, row, WINDOW_H, KEYS[0])
    if KEYS[0] == 1:
        terms = term_w
        shift = tl.sum(term_h, 1)
    else:
        terms = term_h[:, :, None] + term_w[:, None, :]
        terms = tl.reshape(terms, [terms.shape[0], KEYS[0] * KEYS[1]])
        shift = tl.zeros([terms.shape[0]], tl.float32)
    return _scores(q, k, terms, scale, D1), shift


@triton.jit
def _terms_of_columns(rel_w, query, column, WINDOW_W: tl.constexpr, COLUMNS: tl.constexpr):
    """The relative terms (tokens, COLUMNS) of key columns from `column` on."""
    _, _, token, exists = query
    columns = column + tl.arange(0, COLUMNS)
    pointers = rel_w + token.to(tl.int64)[:, None] * WINDOW_W + columns[None, :]
    return tl.load(pointers, mask=exists[:, None] & (columns < WINDOW_W)[None, :], other=0.0)


@triton.jit
def _terms_of_rows(rel_h, query, tokens, row, WINDOW_H: tl.constexpr, ROWS: tl.constexpr):
    """The relative terms (tokens, ROWS) of key rows from `row` on."""
    _, _, token, exists = query
    rows = row + tl.arange(0, ROWS)
    pointers = rel_h + rows.to(tl.int64)[None, :] * tokens + token[:, None]
    return tl.load(pointers, mask=exists[:, None] & (rows < WINDOW_H)[None, :], other=0.0)
