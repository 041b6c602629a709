"""Focal and dice loss in chunks of rows: no full-size map outlives its chunk, forward or backward.

Resizes and their transposes are matrix products (`mask_postprocess.resize`) and the sums have a fixed order, so that losses and
gradients are the same in every run.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.chunking import chunks
from refsam_kernels.mask_loss.inputs import Inputs, Outputs
from refsam_kernels.mask_postprocess.resize import TwoResizes, two_resizes


class Chunk(NamedTuple):
    """A few rows of a few masks: their indices, logits, targets and ignored pixels."""

    masks: slice
    rows: slice
    x: Tensor
    target: Tensor
    ignore: Tensor | None


def forward(inputs: Inputs) -> Outputs:
    """Like `reference.forward`."""
    logits, targets, ignore, _, _, alpha, gamma = inputs
    resizes = _resizes(inputs)
    totals = logits.new_zeros(5, len(logits))
    for chunk in _chunks(resizes, inputs):
        x, target = chunk.x, chunk.target
        probability = torch.sigmoid(x)
        focal = _balance(target, alpha) * _error(probability, target) ** gamma
        focal *= _cross_entropy(x, target)
        if chunk.ignore is not None:
            probability = probability.masked_fill_(chunk.ignore, 0.0)
            focal = focal.masked_fill_(chunk.ignore, 0.0)
        totals[0, chunk.masks] += focal.sum(dim=(1, 2))
        totals[1, chunk.masks] += torch.linalg.vecdot(probability.flatten(1), target.flatten(1))
        totals[2, chunk.masks] += probability.sum(dim=(1, 2))
        totals[3, chunk.masks] += target.sum(dim=(1, 2))
    totals[4] = targets[0].numel() if ignore is None else (~ignore).sum(dim=(1, 2))
    focal, intersection, probabilities, inside, pixels = totals
    dice = 1 - (2 * intersection + 1) / (probabilities + inside + 1)
    return Outputs(focal / pixels.clamp(min=1), dice, totals[1:].clone())


def backward(
    inputs: Inputs, outputs: Outputs, grads: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Like `reference.backward`; the resized logits are computed again, chunk by chunk."""
    logits, targets, _, _, _, alpha, gamma = inputs
    grad_focal, grad_dice = grads
    resizes = _resizes(inputs)
    intersection, probabilities, inside, pixels = outputs.sums.view(4, -1, 1, 1)
    grad_focal = grad_focal.view(-1, 1, 1) / pixels.clamp(min=1)
    denominator = probabilities + inside + 1
    grad_outside = grad_dice.view(-1, 1, 1) * (2 * intersection + 1) / denominator**2
    grad_inside = grad_dice.view(-1, 1, 1) * -2 / denominator
    grad_rows = logits.new_empty(len(logits), targets.shape[1], logits.shape[2])
    for chunk in _chunks(resizes, inputs):
        target, masks = chunk.target, chunk.masks
        probability = torch.sigmoid(chunk.x)
        slope = probability * (1 - probability)
        grad_x = _focal_slope(chunk.x, target, probability, slope, alpha, gamma)
        grad_x *= grad_focal[masks]
        grad_x += slope.mul_(target * grad_inside[masks] + grad_outside[masks])
        if chunk.ignore is not None:
            grad_x.masked_fill_(chunk.ignore, 0.0)
        grad_rows[masks, chunk.rows] = resizes.columns_transposed(grad_x)
    return [resizes.rows_transposed(grad_rows)]


def _resizes(inputs: Inputs) -> TwoResizes:
    logits, input_size = inputs.logits, tuple(inputs.input_size)
    low, size = tuple(logits.shape[1:]), tuple(inputs.targets.shape[1:])
    return two_resizes(low, inputs.image_size, input_size, size, logits.dtype, logits.device)


def _chunks(resizes: TwoResizes, inputs: Inputs) -> Iterator[Chunk]:
    """Walks over masks and rows so that a chunk has about as many pixels as suit the device."""
    logits, targets, ignore, *_ = inputs
    count, height, width = targets.shape
    for masks in chunks(count, height * width, logits.device):
        resized_rows = resizes.rows(logits[masks])
        for rows in chunks(height, width, logits.device):
            target = targets[masks, rows].to(logits.dtype)
            ignored = None
            if ignore is not None:
                ignored = ignore[masks, rows]
                target = target.masked_fill(ignored, 0.0)
            yield Chunk(masks, rows, resizes.columns(resized_rows[:, rows]), target, ignored)


def _cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    return (1 - target).mul_(x).sub_(F.logsigmoid(x))


def _balance(target: Tensor, alpha: float) -> Tensor:
    return target * (2 * alpha - 1) + (1 - alpha)


def _error(probability: Tensor, target: Tensor) -> Tensor:
    """1 - the probability of being right, for soft targets too."""
    return torch.lerp(probability, 1 - probability, target)


def _focal_slope(
    x: Tensor, target: Tensor, probability: Tensor, slope: Tensor, alpha: float, gamma: float
) -> Tensor:
    """The derivative of balance * error**gamma * cross_entropy by x; `slope` is the probability's."""
    error = _error(probability, target).clamp_(min=torch.finfo(x.dtype).tiny)
    of_error = _cross_entropy(x, target).mul_(1 - 2 * target).mul_(slope).mul_(gamma)
    of_entropy = (probability - target).mul_(error)
    return of_entropy.add_(of_error).mul_(error ** (gamma - 1)).mul_(_balance(target, alpha))
