"""The losses of a batch of masks: dice and focal from low-resolution logits, and the error of the predicted IoU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam.model import FrameSize, MaskOutput
from refsam.training.settings import LossSettings
from refsam_kernels import mask_loss


def mask_losses(
    output: MaskOutput,
    masks: Tensor,
    ignore: Tensor | None,
    size: FrameSize,
    image_size: int,
    settings: LossSettings,
    scale: int = 1,
) -> dict[str, Tensor]:
    """Scalar losses of P predicted masks against masks (P, H, W) bool (paper, section 3.4).

    `ignore (P, H, W)` bool: ignored pixels, None for none. `scale` divides the size at which the loss is taken,
    against masks averaged down to the same size; a pixel with any ignored part is ignored.
    """
    targets = masks
    if scale > 1:
        targets = F.avg_pool2d(masks.float()[:, None], scale, ceil_mode=True)[:, 0]
        if ignore is not None:
            ignore = F.max_pool2d(ignore.float()[:, None], scale, ceil_mode=True)[:, 0] > 0
    focal, dice = mask_loss(
        output.logits,
        targets,
        image_size=image_size // scale,
        input_size=(-(-size.resized[0] // scale), -(-size.resized[1] // scale)),
        ignore=ignore,
    )
    losses = {"focal": focal.mean(), "dice": dice.mean()}
    if settings.iou:
        truth = actual_iou(output.logits, masks, ignore, size, image_size)
        losses["iou"] = F.mse_loss(output.iou.float(), truth)
    return losses


@torch.no_grad()
def actual_iou(
    logits: Tensor, masks: Tensor, ignore: Tensor | None, size: FrameSize, image_size: int
) -> Tensor:
    """IoU (P,) float32 of the thresholded low-resolution logits with the masks, `ignore` left out; 1 where both are empty."""
    stride = image_size / logits.shape[-1]
    height, width = (round(side / stride) for side in size.resized)
    predicted = logits[:, :height, :width] > 0
    truth = F.interpolate(masks[:, None].float(), (height, width), mode="area")[:, 0] > 0.5
    if ignore is not None:
        counted = F.interpolate(ignore[:, None].float(), (height, width), mode="area")[:, 0] <= 0.5
        predicted, truth = predicted & counted, truth & counted
    overlap = (predicted & truth).sum(dim=(1, 2)).float()
    union = (predicted | truth).sum(dim=(1, 2)).float()
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)
