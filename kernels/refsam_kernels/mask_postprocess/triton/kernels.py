"""Triton kernels of mask_postprocess: both resizes per pixel from a few low-resolution logits, to bytes, bits or ends of runs.

No launch synchronises and no shape depends on values, so CUDA graphs can capture all of them.
"""

import triton
import triton.language as tl


@triton.jit
def resized_tile(
    logits,  # (4h, 4w) float32, one mask
    low_width,
    row_start,  # (n,) int32
    row_weights,  # (ROW_TAPS, row_stride) float32
    row_stride, column_start, column_weights, column_stride,
    ys,  # (Y,) rows and
    xs,  # (X,) columns of the output
    height, width,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr,
):  # fmt: skip
    """The logits (Y, X) at full size, of positions outside (height, width) 0."""
    y_inside, x_inside = ys < height, xs < width
    top = tl.load(row_start + ys, mask=y_inside, other=0)
    left = tl.load(column_start + xs, mask=x_inside, other=0)
    inside = y_inside[:, None] & x_inside[None, :]
    value = tl.zeros([ys.shape[0], xs.shape[0]], dtype=tl.float32)
    for i in range(ROW_TAPS):  # not unrolled: ptxas would spill
        line = logits + (top + i)[:, None] * low_width + left[None, :]
        widened = tl.zeros([ys.shape[0], xs.shape[0]], dtype=tl.float32)
        for j in tl.static_range(COLUMN_TAPS):
            share = tl.load(column_weights + j * column_stride + xs, mask=x_inside, other=0.0)
            widened += share[None, :] * tl.load(line + j, mask=inside, other=0.0)
        share = tl.load(row_weights + i * row_stride + ys, mask=y_inside, other=0.0)
        value += share[:, None] * widened
    return value


@triton.jit(do_not_specialize=["height"])
def _masks_kernel(
    logits,  # (P, 4h, 4w) float32
    masks,  # (P, H, W) uint8
    row_start, row_weights, column_start, column_weights, low_height, low_width, height, width,
    threshold,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    i_mask = tl.program_id(1).to(tl.int64)
    tiles_x = tl.cdiv(width, BLOCK_X)
    ys = tl.program_id(0) // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
    xs = tl.program_id(0) % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    value = resized_tile(
        logits + i_mask * low_height * low_width, low_width, row_start, row_weights, height,
        column_start, column_weights, width, ys, xs, height, width, ROW_TAPS, COLUMN_TAPS,
    )  # fmt: skip
    target = masks + i_mask * height * width + ys.to(tl.int64)[:, None] * width + xs[None, :]
    inside = (ys < height)[:, None] & (xs < width)[None, :]
    tl.store(target, (value > threshold).to(tl.uint8), mask=inside)


@triton.jit
def _bits_kernel(
    logits,  # (P, 4h, 4w) float32
    places,  # (P, 5) int64, see `taps.Places`
    words,  # (n,) int32
    partial,  # (P, tiles, 8) int32, statistics of tiles
    row_start, row_weights, row_stride, column_start, column_weights, column_stride, low_height,
    low_width, threshold, stability_offset,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    i_mask, i_tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    height = tl.load(places + 5 * i_mask).to(tl.int32)
    width = tl.load(places + 5 * i_mask + 1).to(tl.int32)
    o_row = tl.load(places + 5 * i_mask + 2)
    o_column = tl.load(places + 5 * i_mask + 3)
    o_word = tl.load(places + 5 * i_mask + 4)
    words_y = tl.cdiv(height, 32)
    # Tiles lie column by column, so that one beyond the mask has no column of it.
    i_word = i_tile % words_y
    ys = i_word * 32 + tl.arange(0, 32)
    xs = i_tile // words_y * BLOCK_X + tl.arange(0, BLOCK_X)
    value = resized_tile(
        logits + i_mask * low_height * low_width, low_width,
        row_start + o_row, row_weights + o_row, row_stride,
        column_start + o_column, column_weights + o_column, column_stride,
        ys, xs, height, width, ROW_TAPS, COLUMN_TAPS,
    )  # fmt: skip
    inside = (ys < height)[:, None] & (xs < width)[None, :]
    mask = (inside & (value > threshold)).to(tl.int32)
    word = tl.sum(mask << tl.arange(0, 32)[:, None], axis=0)
    target = words + o_word + xs.to(tl.int64) * words_y + i_word
    tl.store(target, word, mask=xs < width)

    target = partial + (i_mask * tl.num_programs(0) + i_tile) * 8
    certain = inside & (value > threshold + stability_offset)
    possible = inside & (value > threshold - stability_offset)
    columns, rows = tl.max(mask, axis=0) > 0, tl.max(mask, axis=1) > 0
    tl.store(target, tl.sum(tl.sum(mask, axis=1), axis=0))
    tl.store(target + 1, tl.sum(tl.sum(certain.to(tl.int32), axis=1), axis=0))
    tl.store(target + 2, tl.sum(tl.sum(possible.to(tl.int32), axis=1), axis=0))
    tl.store(target + 3, tl.min(tl.where(columns, xs, width), axis=0))
    tl.store(target + 4, tl.min(tl.where(rows, ys, height), axis=0))
    tl.store(target + 5, tl.max(tl.where(columns, xs + 1, 0), axis=0))
    tl.store(target + 6, tl.max(tl.where(rows, ys + 1, 0), axis=0))
    nan = (value != value) & inside
    tl.store(target + 7, tl.sum(tl.sum(nan.to(tl.int32), axis=1), axis=0))


@triton.jit(do_not_specialize=["tiles"])
def _statistics_kernel(
    partial,  # (P, tiles, 8) int32
    statistics,  # (P, 8) int64
    tiles,
    BLOCK: tl.constexpr,
):
    """One program for one statistic of one mask."""
    i_mask, i_column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = partial + i_mask * tiles * 8
    total = tl.zeros([BLOCK], dtype=tl.int64)
    least = tl.full([BLOCK], 2147483647, dtype=tl.int32)
    greatest = tl.zeros([BLOCK], dtype=tl.int32)
    area = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(source + i * 8 + i_column, mask=i < tiles, other=0)
        total += value
        least = tl.minimum(least, tl.where(i < tiles, value, 2147483647))
        greatest = tl.maximum(greatest, value)
        area += tl.load(source + i * 8, mask=i < tiles, other=0)
    is_empty = tl.sum(area, axis=0) == 0
    result = tl.sum(total, axis=0)
    result = tl.where((i_column == 3) | (i_column == 4), tl.min(least, axis=0).to(tl.int64), result)
    is_extent = (i_column == 5) | (i_column == 6)
    result = tl.where(is_extent, tl.max(greatest, axis=0).to(tl.int64), result)
    is_box = (i_column >= 3) & (i_column <= 6)
    tl.store(statistics + i_mask * 8 + i_column, tl.where(is_box & is_empty, 0, result))


@triton.jit
def changes_of(words, height, i, count):
    """Bits that differ from the previous pixel, (n,) uint32, for the words i (n,) of a mask of `count` words."""
    words_y = tl.cdiv(height, 32)
    word = tl.load(words + i, mask=i < count, other=0).to(tl.uint32, bitcast=True)
    before = tl.load(words + i - 1, mask=(i < count) & (i > 0), other=0)
    before = before.to(tl.uint32, bitcast=True)
    row = i % words_y * 32
    last = tl.where(row == 0, (height - 1) % 32, 31).to(tl.uint32)
    shifted = (word << 1) | ((before >> last) & 1)
    valid = tl.minimum(height - row, 32).to(tl.uint32)
    every = tl.full(i.shape, 0xFFFFFFFF, dtype=tl.uint32)
    changes = (word ^ shifted) & (every >> (32 - valid))
    return tl.where(i < count, changes, 0)


@triton.jit
def ones_of(x):
    """The number of bits that are set in (n,) uint32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x + (x >> 8) + (x >> 16) + (x >> 24)) & 0x3F).to(tl.int32)


@triton.jit
def _count_runs_kernel(
    words,  # (n,) int32
    places,  # (P, 5) int64
    counts,  # (P, blocks) int32
    BLOCK: tl.constexpr,
):
    i_mask, i_block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    height = tl.load(places + 5 * i_mask).to(tl.int32)
    width = tl.load(places + 5 * i_mask + 1).to(tl.int32)
    words += tl.load(places + 5 * i_mask + 4)
    i = i_block * BLOCK + tl.arange(0, BLOCK)
    changes = changes_of(words, height, i, width * tl.cdiv(height, 32))
    count = tl.sum(ones_of(changes), axis=0)
    tl.store(counts + i_mask * tl.num_programs(0) + i_block, count)


@triton.jit(do_not_specialize=["capacity"])
def _write_runs_kernel(
    words,  # (n,) int32
    places,  # (P, 5) int64
    behind,  # (P, blocks) int64: how many runs end in this block and the ones before it
    ends,  # (capacity,) int32
    capacity,
    BLOCK: tl.constexpr,
):
    i_mask, i_block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    height = tl.load(places + 5 * i_mask).to(tl.int32)
    width = tl.load(places + 5 * i_mask + 1).to(tl.int32)
    words += tl.load(places + 5 * i_mask + 4)
    i = i_block * BLOCK + tl.arange(0, BLOCK)
    words_y = tl.cdiv(height, 32)
    changes = changes_of(words, height, i, width * words_y)
    ones = ones_of(changes)
    rank = tl.load(behind + i_mask * tl.num_programs(0) + i_block) - tl.sum(ones, axis=0)
    rank += tl.cumsum(ones, axis=0) - ones
    position = i // words_y * height + i % words_y * 32
    for bit in tl.static_range(32):
        changed = (changes >> bit) & 1
        tl.store(ends + rank, position + bit, mask=(changed == 1) & (rank < capacity))
        rank += changed.to(tl.int64)
