"""Mask logits to masks without a full-size map of logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refsam_kernels.mask_postprocess import reference
from refsam_kernels.mask_postprocess.resize import two_resizes

# Logits at full size that exist at once: what stays in a CPU's cache, and what fills a GPU.
CHUNK_ELEMENTS_CPU = 2**18
CHUNK_ELEMENTS = 2**23


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
        size = max(1, CHUNK_ELEMENTS // (height * width))
        for mask, part in zip(masks.split(size), logits.split(size), strict=True):
            resized = reference.resize_twice(part, image_size, input_size, output_size)
            torch.gt(resized, threshold, out=mask)
        return masks
    sizes = (tuple(logits.shape[1:]), image_size, tuple(input_size), (height, width))
    resizes = two_resizes(*sizes, logits.dtype, logits.device)
    size = max(1, CHUNK_ELEMENTS_CPU // width)
    for mask, part in zip(masks, logits.unsqueeze(1), strict=True):
        rows = resizes.rows(part)
        for out, chunk in zip(mask.split(size), rows.split(size, dim=1), strict=True):
            torch.gt(resizes.columns(chunk)[0], threshold, out=out)
    return masks
