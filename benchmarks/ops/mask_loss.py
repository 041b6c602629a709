"""Focal and dice loss at the targets' size with the gradient to the logits, against two interpolations and the formula."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._eager import against_eager
from benchmarks.ops.mask_postprocess import IMAGE_SIZE, INPUT_SIZE, LOW, interpolate, smooth_logits
from benchmarks.registry import Workload, register
from refsam_kernels import mask_loss


def eager(
    logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, **sizes: Any
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss (P,) as DETR and RefSAM's authors write them; `sizes` are those of `interpolate`."""
    x = interpolate(logits, (targets.shape[1], targets.shape[2]), **sizes).flatten(1)
    target = targets.to(x.dtype).flatten(1)
    p = x.sigmoid()
    dice = 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)
    entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    correct = p * target + (1 - p) * (1 - target)
    focal = entropy * (1 - correct) ** gamma
    focal = focal * (alpha * target + (1 - alpha) * (1 - target))
    return focal.mean(1), dice


def fused(logits: Tensor, targets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The operator."""
    return mask_loss(logits, targets, image_size=IMAGE_SIZE, input_size=INPUT_SIZE, backend=backend)


def workload(device: str, *, masks: int, size: tuple[int, int]) -> Workload:
    """Both losses and the gradient of a weighted sum; targets are masks of other smooth logits."""
    logits = smooth_logits(masks, device)
    targets = interpolate(smooth_logits(masks, device).flip(0, 1), size) > 0
    compared = against_eager(
        "mask_loss",
        eager,
        fused,
        {"logits": logits.requires_grad_(), "targets": targets},
        # Resizing forth, again, and back; some thirty operations for losses and slopes.
        flops=targets.numel() * (3 * 8 + 30),
        shapes={"logits": [masks, LOW, LOW], "targets": list(targets.shape)},
        with_compiled=True,
    )
    moved = 2 * (logits.nbytes + targets.nbytes) + logits.nbytes
    return replace(compared, moved_bytes=moved)


for name, masks, size in (
    ("4 masks at 480p, forward and backward", 4, (480, 854)),
    ("8 masks at 1080p, forward and backward", 8, (1080, 1920)),
):
    register("mask_loss", name, baseline="eager")(partial(workload, masks=masks, size=size))
