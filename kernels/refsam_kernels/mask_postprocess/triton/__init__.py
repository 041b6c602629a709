"""`mask_postprocess` in Triton: its launches; see `kernels`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from refsam_kernels.core.triton_aot import CompileCase, Launch
from refsam_kernels.mask_postprocess.inputs import Bits, BitsInputs, Inputs, Runs, RunsInputs
from refsam_kernels.mask_postprocess.layout import STATISTICS, WORD, pairs, words_of
from refsam_kernels.mask_postprocess.taps import MOST_TAPS, Places, Size, places_of
from refsam_kernels.mask_postprocess.triton.kernels import (
    _bits_kernel,
    _count_runs_kernel,
    _masks_kernel,
    _statistics_kernel,
    _write_runs_kernel,
)

BLOCK_ROWS, BLOCK_COLUMNS = 8, 128  # of the kernel that writes bytes
WORD_COLUMNS = 64  # times 32 rows, of the kernel that writes bits
ENLARGING_TAPS = 4  # of an output position at most where both resizes enlarge
BLOCK_TILES = 256
BLOCK_WORDS = 256
MOST_MASKS = 65535  # of the second dimension of a grid


def not_supported_reasons(inputs: Inputs | BitsInputs) -> list[str]:
    """Why the kernels cannot compute these: another dtype than float32, or too many masks or taps."""
    logits, image_size, input_sizes, output_sizes = inputs[:4]
    return resize_reasons(logits, image_size, pairs(input_sizes), pairs(output_sizes))


bits_not_supported_reasons = not_supported_reasons


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


def forward(inputs: Inputs) -> Tensor:
    """Like `reference.forward`; equal except where |logit| < 1e-5 of the scale."""
    logits, image_size, input_size, output_size, threshold = inputs
    masks = logits.new_empty(len(logits), *output_size, dtype=torch.bool)
    if len(logits):
        sizes = (tuple(pairs(input_size)), tuple(pairs(output_size)))
        places = places_of(tuple(logits.shape[1:]), image_size, *sizes, logits.device)
        _masks_launch(logits.contiguous(), masks, places, threshold).run()
    return masks


def bits(inputs: BitsInputs) -> Bits:
    """Like `reference.bits`, all masks in one launch and their statistics in another."""
    logits, image_size, input_sizes, output_sizes, *thresholds = inputs
    sizes = tuple(pairs(output_sizes))
    words = logits.new_empty(sum(words_of(*size) for size in sizes), dtype=torch.int32)
    statistics = logits.new_empty(len(sizes), len(STATISTICS), dtype=torch.int64)
    if sizes:
        low_size, cropped = tuple(logits.shape[1:]), tuple(pairs(input_sizes))
        places = places_of(low_size, image_size, cropped, sizes, logits.device)
        for launch in _bits_launches(
            logits.contiguous(), Bits(words, statistics), places, thresholds
        ):
            launch.run()
    return Bits(words, statistics)


def runs(inputs: RunsInputs) -> Runs:
    """Like `reference.runs`: runs are counted, then written to where the count says."""
    words, output_sizes, capacity = inputs
    sizes = tuple(pairs(output_sizes))
    ends = words.new_empty(capacity)
    if not sizes:
        return Runs(ends, words.new_empty(0, dtype=torch.int64))
    places = places_of((1, 1), 1, ((1, 1),) * len(sizes), sizes, words.device)
    counts = words.new_empty(len(sizes), triton.cdiv(places.most_words, BLOCK_WORDS))
    _count_launch(words, counts, places).run()
    _write_launch(words, counts.flatten().cumsum(0), ends, places).run()
    return Runs(ends, counts.sum(dim=1))


def resize_arguments(logits: Tensor, places: Places) -> dict[str, Any]:
    """The arguments of every kernel that resizes contiguous logits (P, 4h, 4w)."""
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
    logits: Tensor, outputs: Bits, places: Places, thresholds: Sequence[float]
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
    # The more taps, the more sums of a tile are in flight: they are spread over more threads.
    taps = max(places.rows.count, places.columns.count)
    yield Launch(_bits_kernel, (tiles, count), arguments, 8 if taps > ENLARGING_TAPS else 4)
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
    """SAM's resizes with three taps to 1080p, and a reduction, which has the most taps."""
    logits = torch.empty(8, 256, 256, device="meta")
    masks = torch.empty(8, 1080, 1920, dtype=torch.bool, device="meta")
    words = torch.empty(8 * words_of(1080, 1920), dtype=torch.int32, device="meta")
    numbers = torch.empty(8, len(STATISTICS), dtype=torch.int64, device="meta")
    cases = []
    for name, image_size, cropped in (("enlarging", 1024, (576, 1024)), ("reducing", 40, (23, 40))):
        sizes = ((cropped,) * 8, ((1080, 1920),) * 8)
        places = places_of((256, 256), image_size, *sizes, logits.device)
        to_bits, total = _bits_launches(logits, Bits(words, numbers), places, (0.0, 1.0))
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
