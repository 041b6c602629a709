"""Focal and dice loss of mask logits against targets of another size."""

import torch
from torch import Tensor

from refsam_kernels.core.checks import check_same_device, check_shape, require
from refsam_kernels.core.index_checks import check_finite, check_range
from refsam_kernels.core.registration import Operator
from refsam_kernels.mask_loss.inputs import Inputs, Outputs
from refsam_kernels.mask_postprocess.op import check_resize

operator = Operator("mask_loss", Inputs, Outputs)


@operator.forward
def _forward(inputs: Inputs) -> Outputs:
    logits, masks = inputs.logits, inputs.logits.shape[0]
    return Outputs(logits.new_empty(masks), logits.new_empty(masks), logits.new_empty(4, masks))


operator.differentiate(
    {"grad_focal": "focal", "grad_dice": "dice"}, saved=["sums"], frozen=["targets", "ignore"]
)


def mask_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    image_size: int,
    input_size: tuple[int, int],
    ignore: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of every mask at the targets' size, from low-resolution logits.

    The logits are resized as in `mask_postprocess`. Focal loss of arXiv 1708.02002, mean over pixels; dice is
    1 - (2 sum(p g) + 1) / (sum p + sum g + 1). Computed in float32 under autocast too; float64 stays float64.

    Args:
        logits: (P, 4h, 4w) floating point, finite.
        targets: (P, H, W) bool, uint8 of 0 and 1, or floating point in 0..1; no gradient flows to them.
        image_size: side S of the model's square image.
        input_size: (height, width) of the frame within that image, without the padding; at most S.
        ignore: (P, H, W) bool, ignored pixels, where targets may hold anything; None: all count.
        alpha: weight of inside pixels in the focal loss.
        gamma: exponent of the focal loss, at least 0.
        backend: name of the backend; None lets the library choose.

    Returns:
        focal (P,) and dice (P,) in float32, or float64 for such logits. A fully ignored mask has focal loss 0.

    Raises:
        ValueError: a shape, dtype, device, size or value does not fit.
        BackendError: the requested backend cannot run.
    """
    check_resize(logits, image_size, input_size)
    _check_targets(logits, targets, ignore)
    require(0 <= alpha <= 1, "alpha", alpha, "a share in 0..1")
    require(gamma >= 0, "gamma", gamma, "at least 0")
    check_finite("logits", logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    settings = (image_size, list(input_size), float(alpha), float(gamma))
    focal, dice, _ = _forward(*Inputs(logits, targets, ignore, *settings), backend or "")
    return focal, dice


def _check_targets(logits: Tensor, targets: Tensor, ignore: Tensor | None) -> None:
    require(len(logits) > 0, "logits", "no expressions", "at least one")
    check_shape("targets", targets, (len(logits), "H", "W"))
    require(targets.numel() > 0, "targets", f"shape {tuple(targets.shape)}", "no empty dimension")
    check_same_device(logits=logits, targets=targets, ignore=ignore)
    fits = targets.is_floating_point() or targets.dtype in (torch.bool, torch.uint8)
    require(fits, "targets", targets.dtype, "torch.bool, torch.uint8 or a floating point dtype")
    counted = targets
    if ignore is not None:
        check_shape("ignore", ignore, tuple(targets.shape))
        require(ignore.dtype == torch.bool, "ignore", ignore.dtype, "torch.bool")
        counted = targets.masked_fill(ignore, 0)
    if targets.dtype != torch.bool:
        check_range("targets", counted, 0, 1)
