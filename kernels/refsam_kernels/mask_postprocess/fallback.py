"""Mask logits to masks without a full-size map of the logits of all masks."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from refsam_kernels.core.chunking import ELEMENTS_ELSEWHERE, chunks
from refsam_kernels.mask_postprocess import reference
from refsam_kernels.mask_postprocess.inputs import Bits, BitsInputs, Inputs
from refsam_kernels.mask_postprocess.layout import pairs
from refsam_kernels.mask_postprocess.resize import two_resizes
from refsam_kernels.mask_postprocess.taps import Taps, taps_of

runs = reference.runs


def forward(inputs: Inputs) -> Tensor:
    """Like `reference.forward`, by matrix products on the CPU; equal except where |logit| < 1e-5 of the scale."""
    logits, _, _, output_size, threshold = inputs
    masks = torch.empty(len(logits), *output_size, dtype=torch.bool, device=logits.device)
    for part, rows, full in _resized(*inputs[:4]):
        torch.gt(full, threshold, out=masks[part, rows])
    return masks


def bits(inputs: BitsInputs) -> Bits:
    """Like `reference.bits`: one mask at a time."""
    logits, image_size, input_sizes, output_sizes, threshold, stability_offset = inputs
    words, statistics = [logits.new_empty(0, dtype=torch.int32)], []
    sizes = zip(pairs(input_sizes), pairs(output_sizes), strict=True)
    for index, (input_size, output_size) in enumerate(sizes):
        mask = torch.empty(output_size, dtype=torch.bool, device=logits.device)
        counts = torch.zeros(3, dtype=torch.int64, device=logits.device)
        for _, rows, full in _resized(
            logits[index : index + 1], image_size, input_size, output_size
        ):
            torch.gt(full[0], threshold, out=mask[rows])
            certain, possible = (
                full > threshold + stability_offset,
                full > threshold - stability_offset,
            )
            counts += torch.stack([*map(reference.count, (certain, possible, full.isnan()))])
        words.append(reference.pack(mask))
        statistics.append(
            torch.cat([reference.count(mask)[None], counts[:2], reference.box(mask), counts[2:]])
        )
    joined = torch.stack(statistics) if statistics else reference.no_statistics(logits)
    return Bits(torch.cat(words), joined)


def _resized(
    logits: Tensor, image_size: int, input_size: Sequence[int], output_size: Sequence[int]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield masks, rows of them, and their logits at full size, a part at a time."""
    height, width = output_size
    if not has_exact_products(logits):
        if height * width > ELEMENTS_ELSEWHERE:
            yield from _tiles(logits, image_size, input_size, output_size)
            return
        for part in chunks(len(logits), height * width, logits.device):
            full = reference.resize_twice(logits[part], image_size, input_size, output_size)
            yield part, slice(0, height), full
        return
    low, cropped = tuple(logits.shape[1:]), tuple(input_size)
    resizes = two_resizes(low, image_size, cropped, (height, width), logits.dtype, logits.device)
    for index in range(len(logits)):
        part = slice(index, index + 1)
        resized_rows = resizes.rows(logits[part])
        for rows in chunks(height, width, logits.device):
            yield part, rows, resizes.columns(resized_rows[:, rows])


def has_exact_products(logits: Tensor) -> bool:
    """Whether matrix products of such tensors are not rounded to TF32, as they may be on a GPU."""
    return logits.device.type == "cpu"


def _tiles(
    logits: Tensor, image_size: int, input_size: Sequence[int], output_size: Sequence[int]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """`_resized` by taps, some rows of one mask at a time: memory does not grow with the output's size."""
    height, width = output_size
    row_taps, column_taps = (
        taps_of(low, image_size, ((cropped, output),), logits.device)
        for low, cropped, output in zip(logits.shape[1:], input_size, output_size, strict=True)
    )
    for index, mask in enumerate(logits):
        for rows in chunks(height, width, logits.device):
            resized = _along(mask, row_taps, rows)
            columns = _along(resized.T, column_taps, slice(0, width)).T
            yield slice(index, index + 1), rows, columns[None]


def _along(values: Tensor, taps: Taps, outputs: slice) -> Tensor:
    """Some output positions of a resize along the first dimension: (n, c) -> (outputs, c)."""
    start, weights = taps.start[outputs].long(), taps.weights[:, outputs]
    parts = (weights[tap, :, None] * values[start + tap] for tap in range(taps.count))
    total = next(parts)
    for part in parts:
        total += part
    return total
