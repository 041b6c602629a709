"""Mask logits to packed bits and to COCO's run lengths, any size per mask, with area, box and stability from the same pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refsam_kernels.core.checks import require
from refsam_kernels.core.index_checks import check_finite
from refsam_kernels.mask_postprocess.inputs import Bits, BitsInputs, Runs, RunsInputs
from refsam_kernels.mask_postprocess.layout import STATISTICS, pairs, unpack, words_of
from refsam_kernels.mask_postprocess.op import check_resize, check_size, operator
from refsam_kernels.mask_postprocess.run_lengths import RunLengths, encode

Size = tuple[int, int]
# Runs that are fetched together with their number; more of them cost a second round. An outline that crosses every column
# twice has two per column.
RUNS_PER_COLUMN = 16
LARGEST_MASK = 2**31 - 1


class MaskStatistics(NamedTuple):
    """Area, box and stability of P masks.

    area (P,) int64: pixels inside. box (P, 4) int64: left, top, right, bottom, the last two outside it; all 0 if the mask is
    empty. stability (P,) float32 in 0..1: the IoU of the masks at threshold + offset and at threshold - offset, as
    `calculate_stability_score` of segment_anything/utils/amg.py; 0 where both are empty.
    """

    area: Tensor
    box: Tensor
    stability: Tensor


class PackedMasks(NamedTuple):
    """P masks as bits: words (n,) int32 laid out as `layout` says, (height, width) of each, and statistics."""

    words: Tensor
    sizes: tuple[Size, ...]
    statistics: MaskStatistics

    def masks(self) -> list[Tensor]:
        """The masks as (H, W) bool each."""
        return list(unpack(self.words, self.sizes))


def _fake_bits(inputs: BitsInputs) -> Bits:
    logits = inputs.logits
    count = sum(words_of(*size) for size in pairs(inputs.output_sizes))
    statistics = logits.new_empty((len(logits), len(STATISTICS)), dtype=torch.int64)
    return Bits(logits.new_empty(count, dtype=torch.int32), statistics)


def _fake_runs(inputs: RunsInputs) -> Runs:
    counts = inputs.words.new_empty(len(inputs.output_sizes) // 2, dtype=torch.int64)
    return Runs(inputs.words.new_empty(inputs.capacity), counts)


_bits = operator.register("bits", BitsInputs, Bits, _fake_bits)
_runs = operator.register("runs", RunsInputs, Runs, _fake_runs)


def mask_postprocess_bits(
    logits: Tensor,
    *,
    image_size: int,
    input_size: Size | Sequence[Size],
    output_size: Size | Sequence[Size],
    threshold: float = 0.0,
    stability_offset: float = 1.0,
    backend: str | None = None,
) -> PackedMasks:
    """`mask_postprocess` to one bit per pixel, with area, box and stability. Not differentiable.

    Args:
        logits: (P, 4h, 4w) floating point, finite; computed in float32. P may be 0.
        image_size: side S of the model's square image.
        input_size: (height, width) of the frame within that image, one for all masks or P of them.
        output_size: (height, width) of the masks, one for all or P of them.
        threshold: logits above it are inside.
        stability_offset: distance from the threshold of the two that stability compares.
        backend: name of the backend; None lets the library choose.

    Returns:
        Everything on the device of the logits, without synchronising.

    Raises:
        ValueError: a shape, dtype, size or value does not fit.
        BackendError: the requested backend cannot run.
    """
    sizes = _check(logits, image_size, input_size, output_size, stability_offset)
    settings = (image_size, *sizes, float(threshold), float(stability_offset))
    words, statistics = _bits(*BitsInputs(logits.detach().float(), *settings), backend or "")
    return PackedMasks(words, tuple(pairs(sizes[1])), _named(statistics[:, :-1]))


def mask_postprocess_rle(
    logits: Tensor,
    *,
    image_size: int,
    input_size: Size | Sequence[Size],
    output_size: Size | Sequence[Size],
    threshold: float = 0.0,
    stability_offset: float = 1.0,
    backend: str | None = None,
) -> tuple[list[RunLengths], MaskStatistics]:
    """`mask_postprocess` to COCO's compressed run lengths, byte for byte those of pycocotools for the same masks.

    Run lengths and statistics come to the host in two copies, with one synchronisation; masks of more than `RUNS_PER_COLUMN`
    runs per column on average cost a second one.

    Args: those of `mask_postprocess_bits`.

    Returns:
        {"size": [H, W], "counts": bytes} of every mask; statistics on the CPU.

    Raises:
        ValueError: a shape, dtype, size or value does not fit, a resized logit is NaN (on every device, here the result is
            looked at anyway); `BackendError` if the backend cannot run.
    """
    ends, sizes, statistics = mask_runs(
        logits, image_size, input_size, output_size, threshold, stability_offset, backend
    )
    return encode(ends, sizes), _named(statistics)


def mask_runs(
    logits: Tensor,
    image_size: int,
    input_size: Size | Sequence[Size],
    output_size: Size | Sequence[Size],
    threshold: float,
    stability_offset: float,
    backend: str | None = None,
) -> tuple[Sequence[Tensor], list[Size], Tensor]:
    """The runs that `mask_postprocess_rle` encodes, on the CPU.

    Returns:
        Where each mask's runs but the last end, (n,) int32 ascending in column-major order; the masks' sizes; statistics (P, 7)
        int64, the first columns of `STATISTICS`.
    """
    sizes = _check(logits, image_size, input_size, output_size, stability_offset)
    settings = (image_size, *sizes, float(threshold), float(stability_offset))
    words, statistics = _bits(*BitsInputs(logits.detach().float(), *settings), backend or "")
    widths = sizes[1][1::2]
    capacity = RUNS_PER_COLUMN * sum(widths)
    ends, numbers = _fetch(words, statistics, sizes[1], capacity, backend or "")
    counts, statistics = numbers[:, 0], numbers[:, 1:]
    broken = int(statistics[:, STATISTICS.index("nan")].sum())
    require(not broken, "logits", f"{broken} pixels NaN after resizing", "finite values")
    total = int(counts.sum())
    if total > capacity:
        ends, _ = _fetch(words, statistics, sizes[1], total, backend or "")
    return ends[:total].split(counts.tolist()), pairs(sizes[1]), statistics[:, :-1]


def _fetch(
    words: Tensor, statistics: Tensor, output_sizes: Sequence[int], capacity: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Ends of runs (capacity,), and (P, 1 + 8) numbers of runs and statistics, on the host."""
    ends, counts = _runs(*RunsInputs(words, output_sizes, capacity), backend)
    numbers = torch.cat([counts[:, None], statistics.to(counts.device)], dim=1)
    if words.device.type != "cuda":
        return ends.cpu(), numbers.cpu()
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (ends, numbers)]
    for copy, tensor in zip(copies, (ends, numbers), strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(words.device).synchronize()
    return copies[0], copies[1]


def _named(statistics: Tensor) -> MaskStatistics:
    """The operator's columns but the last as the public statistics."""
    area, certain, possible, *box = statistics.unbind(dim=1)
    stability = certain.float() / possible.clamp(min=1).float()
    return MaskStatistics(area, torch.stack(box, dim=1), stability)


def _check(
    logits: Tensor,
    image_size: int,
    input_size: Size | Sequence[Size],
    output_size: Size | Sequence[Size],
    stability_offset: float,
) -> tuple[list[int], list[int]]:
    """Checks everything; returns the input and output size of every mask, 2 P numbers each."""
    check_resize(logits, image_size, (1, 1))
    inputs = _per_mask("input_size", input_size, len(logits))
    outputs = _per_mask("output_size", output_size, len(logits))
    for size in set(inputs):
        check_resize(logits, image_size, size)
    for height, width in set(outputs):
        fits = height * width <= LARGEST_MASK
        require(fits, "output_size", (height, width), f"at most {LARGEST_MASK} pixels")
    require(stability_offset >= 0, "stability_offset", stability_offset, "at least 0")
    check_finite("logits", logits)
    return [side for size in inputs for side in size], [side for size in outputs for side in size]


def _per_mask(name: str, size: Size | Sequence[Size], count: int) -> list[Size]:
    """One size for each of `count` masks; raises `ValueError` for an impossible one or another number of them."""
    entries = _as_lists(size)
    if not entries or isinstance(entries[0], list):
        require(len(entries) == count, name, f"{len(entries)} sizes", f"one, or {count} as logits")
    else:
        entries = [entries] * count or [entries]
    for each in entries:
        check_size(name, each)
    return [(height, width) for height, width in entries[:count]]


def _as_lists(value: Any) -> Any:
    """Sizes as lists of integers, from sequences, arrays and tensors, or sequences of them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_as_lists(each) for each in value] if isinstance(value, Sequence) else value
