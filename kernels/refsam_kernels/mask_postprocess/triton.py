"""Triton kernels of mask_postprocess: both resizes per pixel from a few low-resolution logits, to bytes, bits or ends of runs.

Nothing is waited for and no shape depends on values, so that CUDA graphs can hold every launch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refsam_kernels.core.triton_aot import CompileCase, Launch
from refsam_kernels.mask_postprocess.layout import STATISTICS, WORD, pairs, words_of
from refsam_kernels.mask_postprocess.taps import MOST_TAPS, Places, Size, places_of

BLOCK_ROWS, BLOCK_COLUMNS = 8, 128  # of the kernel that writes bytes
WORD_COLUMNS = 64  # times 32 rows, of the kernel that writes bits
ENLARGING_TAPS = 4  # of an output position at most where both resizes enlarge
BLOCK_TILES = 256
BLOCK_WORDS = 256
MOST_MASKS = 65535  # of the second dimension of a grid


@triton.jit
def resized_tile(
    logits,  # (4h, 4w) float32, one mask
    low_width,
    row_start,  # (n,) int32
    row_weights,  # (ROW_TAPS, row_stride) float32
    row_stride,
    column_start,
    column_weights,
    column_stride,
    ys,  # (Y,) rows and
    xs,  # (X,) columns of the output
    height,
    width,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
):
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
    row_start,
    row_weights,
    column_start,
    column_weights,
    low_height,
    low_width,
    height,
    width,
    threshold,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
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
    row_start,
    row_weights,
    row_stride,
    column_start,
    column_weights,
    column_stride,
    low_height,
    low_width,
    threshold,
    stability_offset,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
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
    """Of the words i (n,) of a mask that has `count`: the bits that differ from the pixel before, (n,) uint32."""
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


def not_supported_reasons(
    logits: Tensor,
    image_size: int,
    input_size: Sequence[int],
    output_size: Sequence[int],
    threshold: float,
) -> list[str]:
    """Why these cannot be resized here: another dtype than float32, more taps than a kernel is made for."""
    return resize_reasons(logits, image_size, pairs(input_size), pairs(output_size))


def bits_not_supported_reasons(
    logits: Tensor,
    image_size: int,
    input_sizes: Sequence[int],
    output_sizes: Sequence[int],
    threshold: float,
    stability_offset: float,
) -> list[str]:
    """Like `not_supported_reasons`."""
    return resize_reasons(logits, image_size, pairs(input_sizes), pairs(output_sizes))


def resize_reasons(
    logits: Tensor, image_size: int, input_sizes: Sequence[Size], output_sizes: Sequence[Size]
) -> list[str]:
    """Why the two resizes of logits (P, 4h, 4w) cannot be computed by taps here."""
    if logits.dtype != torch.float32:
        return [f"computes float32, got {logits.dtype}"]
    if len(logits) > MOST_MASKS:
        return [f"takes at most {MOST_MASKS} masks, got {len(logits)}"]
    if not len(logits):
        return []
    sizes = (tuple(input_sizes), tuple(output_sizes))
    places = places_of(tuple(logits.shape[1:]), image_size, *sizes, logits.device)
    most = max(places.rows.count, places.columns.count)
    wanted = f"needs resizes of at most {MOST_TAPS} taps"
    return [f"{wanted}, these have {most}"] if most > MOST_TAPS else []


def forward(
    logits: Tensor,
    image_size: int,
    input_size: Sequence[int],
    output_size: Sequence[int],
    threshold: float,
) -> Tensor:
    """Like `reference.forward`; equal except where |logit| < 1e-5 of the scale."""
    masks = logits.new_empty(len(logits), *output_size, dtype=torch.bool)
    if len(logits):
        sizes = (tuple(pairs(input_size)), tuple(pairs(output_size)))
        places = places_of(tuple(logits.shape[1:]), image_size, *sizes, logits.device)
        _masks_launch(logits.contiguous(), masks, places, threshold).run()
    return masks


def bits(
    logits: Tensor,
    image_size: int,
    input_sizes: Sequence[int],
    output_sizes: Sequence[int],
    threshold: float,
    stability_offset: float,
) -> tuple[Tensor, Tensor]:
    """Like `reference.bits`, all masks in one launch and their statistics in another."""
    sizes = tuple(pairs(output_sizes))
    words = logits.new_empty(sum(words_of(*size) for size in sizes), dtype=torch.int32)
    statistics = logits.new_empty(len(sizes), len(STATISTICS), dtype=torch.int64)
    if sizes:
        low_size, inputs = tuple(logits.shape[1:]), tuple(pairs(input_sizes))
        places = places_of(low_size, image_size, inputs, sizes, logits.device)
        outputs, thresholds = (words, statistics), (threshold, stability_offset)
        for launch in _bits_launches(logits.contiguous(), outputs, places, thresholds):
            launch.run()
    return words, statistics


def runs(words: Tensor, output_sizes: Sequence[int], capacity: int) -> tuple[Tensor, Tensor]:
    """Like `reference.runs`: runs are counted, then written to where the count says."""
    sizes = tuple(pairs(output_sizes))
    ends = words.new_empty(capacity)
    if not sizes:
        return ends, words.new_empty(0, dtype=torch.int64)
    places = places_of((1, 1), 1, ((1, 1),) * len(sizes), sizes, words.device)
    counts = words.new_empty(len(sizes), triton.cdiv(places.most_words, BLOCK_WORDS))
    _count_launch(words, counts, places).run()
    _write_launch(words, counts.flatten().cumsum(0), ends, places).run()
    return ends, counts.sum(dim=1)


def resize_arguments(logits: Tensor, places: Places) -> dict[str, Any]:
    """What every kernel that resizes contiguous logits (P, 4h, 4w) takes."""
    return {
        "logits": logits,
        "low_height": logits.shape[1],
        "low_width": logits.shape[2],
        "row_start": places.rows.start,
        "row_weights": places.rows.weights,
        "column_start": places.columns.start,
        "column_weights": places.columns.weights,
        "ROW_TAPS": places.rows.count,
        "COLUMN_TAPS": places.columns.count,
    }


def _masks_launch(logits: Tensor, masks: Tensor, places: Places, threshold: float) -> Launch:
    count, height, width = masks.shape
    tiles = triton.cdiv(height, BLOCK_ROWS) * triton.cdiv(width, BLOCK_COLUMNS)
    arguments = resize_arguments(logits, places) | {
        "masks": masks.view(torch.uint8),
        "height": height,
        "width": width,
        "threshold": threshold,
        "BLOCK_Y": BLOCK_ROWS,
        "BLOCK_X": BLOCK_COLUMNS,
    }
    return Launch(_masks_kernel, (tiles, count), arguments)


def _bits_launches(
    logits: Tensor, outputs: tuple[Tensor, Tensor], places: Places, thresholds: tuple[float, float]
) -> Iterator[Launch]:
    words, statistics = outputs
    count = len(logits)
    tiles = max(triton.cdiv(h, WORD) * triton.cdiv(w, WORD_COLUMNS) for h, w in places.sizes)
    partial = words.new_empty(count, tiles, len(STATISTICS))
    arguments = resize_arguments(logits, places) | {
        "places": places.table,
        "words": words,
        "partial": partial,
        "row_stride": places.rows.weights.shape[1],
        "column_stride": places.columns.weights.shape[1],
        "threshold": thresholds[0],
        "stability_offset": thresholds[1],
        "BLOCK_X": WORD_COLUMNS,
    }
    # The more taps, the more sums of a tile are under way: they are spread over more threads.
    taps = max(places.rows.count, places.columns.count)
    num_warps = 8 if taps > ENLARGING_TAPS else 4
    yield Launch(_bits_kernel, (tiles, count), arguments, num_warps)
    arguments = {"partial": partial, "statistics": statistics, "tiles": tiles, "BLOCK": BLOCK_TILES}
    yield Launch(_statistics_kernel, (count, len(STATISTICS)), arguments)


def _count_launch(words: Tensor, counts: Tensor, places: Places) -> Launch:
    arguments = {"words": words, "places": places.table, "counts": counts, "BLOCK": BLOCK_WORDS}
    return Launch(_count_runs_kernel, (counts.shape[1], len(counts)), arguments)


def _write_launch(words: Tensor, behind: Tensor, ends: Tensor, places: Places) -> Launch:
    masks = len(places.table)
    arguments = {
        "words": words,
        "places": places.table,
        "behind": behind,
        "ends": ends,
        "capacity": len(ends),
        "BLOCK": BLOCK_WORDS,
    }
    return Launch(_write_runs_kernel, (len(behind) // masks, masks), arguments)


def compile_cases() -> list[CompileCase]:
    """SAM's resizes, which have three taps, to the size of a film; and a reduction, which has the most."""
    logits = torch.empty(8, 256, 256, device="meta")
    masks = torch.empty(8, 1080, 1920, dtype=torch.bool, device="meta")
    words = torch.empty(8 * words_of(1080, 1920), dtype=torch.int32, device="meta")
    numbers = torch.empty(8, len(STATISTICS), dtype=torch.int64, device="meta")
    cases = []
    for name, image_size, cropped in (("enlarging", 1024, (576, 1024)), ("reducing", 40, (23, 40))):
        sizes = ((cropped,) * 8, ((1080, 1920),) * 8)
        places = places_of((256, 256), image_size, *sizes, logits.device)
        to_bits, total = _bits_launches(logits, (words, numbers), places, (0.0, 1.0))
        cases += [
            _masks_launch(logits, masks, places, 0.0).compile_case(f"masks, {name}"),
            to_bits.compile_case(f"bits, {name}"),
        ]
    count = _count_launch(words, words.new_empty(8, 100), places)
    write = _write_launch(words, numbers.flatten(), words, places)
    return [
        *cases,
        total.compile_case("statistics"),
        count.compile_case("count runs"),
        write.compile_case("write runs"),
    ]
