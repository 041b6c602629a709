"""Mask logits to masks without a full-size map of logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refsam_kernels.chunks import chunks
from refsam_kernels.mask_postprocess import reference
from refsam_kernels.mask_postprocess.resize import two_resizes


def forward(
    logits: Tensor,
    image_size: int,
    input_size: Sequence[int],
    output_size: Sequence[int],
    threshold: float,
) -> Tensor:
    """Like `reference.forward`, by matrix products on the CPU; equal except where |logit| < 1e-5 of the scale."""
    height, width = output_size
    masks = torch.empty(len(logits), height, width, dtype=torch.bool, device=logits.device)
    if logits.device.type != "cpu":  # PyTorch may round products to TF32 there
        for part in chunks(len(logits), height * width, logits.device):
            full = reference.resize_twice(logits[part], image_size, input_size, output_size)
            torch.gt(full, threshold, out=masks[part])
        return masks
    low = tuple(logits.shape[1:])
    resizes = two_resizes(
        low, image_size, tuple(input_size), (height, width), logits.dtype, logits.device
    )
    for mask, part in zip(masks, logits.unsqueeze(1), strict=True):
        resized_rows = resizes.rows(part)
        for rows in chunks(height, width, logits.device):
            torch.gt(resizes.columns(resized_rows[:, rows])[0], threshold, out=mask[rows])
    return masks
