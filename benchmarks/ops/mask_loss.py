"""Focal and dice loss at the targets' size with the gradient to the logits, against two interpolations and the formula."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._feed_forward import bound, exactly, further_than_eager
from benchmarks.ops.mask_postprocess import IMAGE_SIZE, INPUT_SIZE, LOW, interpolate, smooth_logits
from benchmarks.registry import Workload, backends_of, register
from refsam_kernels import mask_loss

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(
    logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss (P,) as DETR and RefSAM's authors write them."""
    x = interpolate(logits, (targets.shape[1], targets.shape[2])).flatten(1)
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


def train(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Both losses and the gradient of their sum."""
    logits = logits.detach().requires_grad_()
    focal, dice = loss(logits, targets)
    (gradient,) = torch.autograd.grad(focal.sum() + dice.sum(), logits)
    return focal.detach(), dice.detach(), gradient


def workload(device: str, *, masks: int, size: tuple[int, int]) -> Workload:
    """Targets are masks of other smooth logits."""
    logits = smooth_logits(masks, device)
    targets = interpolate(smooth_logits(masks, device).flip(0, 1), size) > 0
    ways: dict[str, Loss] = {"eager": eager}
    if device == "cuda":
        ways["compiled eager"] = torch.compile(eager)
    ways |= {
        name: partial(fused, backend=name)
        for name in backends_of("mask_loss", device)
        if name != "reference"
    }
    exact, plain = train(eager, exactly(logits), targets), train(eager, logits, targets)
    bounds = [bound(*pair, torch.float32) for pair in zip(plain, exact, strict=True)]
    return Workload(
        providers={name: partial(train, way, logits, targets) for name, way in ways.items()},
        wrong=partial(further_than_eager, exact=exact, bounds=bounds),
        moved_bytes=2 * (logits.nbytes + targets.nbytes) + logits.nbytes,
        # Resizing forth, again, and back; some thirty operations for losses and slopes.
        flops=targets.numel() * (3 * 8 + 30),
        shapes={"logits": [masks, LOW, LOW], "targets": list(targets.shape)},
    )


for name, masks, size in (
    ("4 masks at 480p, forward and backward", 4, (480, 854)),
    ("8 masks at 1080p, forward and backward", 8, (1080, 1920)),
):
    register("mask_loss", name, baseline="eager")(partial(workload, masks=masks, size=size))
