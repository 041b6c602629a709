"""Focal and dice loss at the targets' size, from the resized logits.

Focal loss of arXiv 1708.02002, mean over the pixels; dice loss with 1 added to numerator and denominator; both per mask.
"""

import torch
import torch.nn.functional as F

from refsam_kernels.core.gradients import derived_backward
from refsam_kernels.mask_loss.inputs import Inputs, Outputs
from refsam_kernels.mask_postprocess.reference import resize_twice


def forward(inputs: Inputs) -> Outputs:
    """Logits (P, 4h, 4w), targets (P, H, W), ignore (P, H, W) bool or None -> focal (P,), dice (P,), sums (4, P)."""
    logits, targets, ignore, image_size, input_size, alpha, gamma = inputs
    x = resize_twice(logits, image_size, input_size, targets.shape[1:])
    target = targets.to(x.dtype)
    counts = torch.ones_like(x)
    if ignore is not None:
        target = target.masked_fill(ignore, 0.0)
        counts = counts.masked_fill(ignore, 0.0)

    probability = torch.sigmoid(x)
    cross_entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    correct = probability * target + (1 - probability) * (1 - target)
    balance = alpha * target + (1 - alpha) * (1 - target)
    focal = balance * (1 - correct) ** gamma * cross_entropy

    pixels = counts.sum(dim=(1, 2))
    intersection = (probability * target).sum(dim=(1, 2))
    probabilities = (probability * counts).sum(dim=(1, 2))
    inside = target.sum(dim=(1, 2))
    dice = 1 - (2 * intersection + 1) / (probabilities + inside + 1)
    focal = (focal * counts).sum(dim=(1, 2)) / pixels.clamp(min=1)
    return Outputs(focal, dice, torch.stack([intersection, probabilities, inside, pixels]))


backward = derived_backward(forward, "logits")
