"""Low-resolution mask logits to masks of the frame's own size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refsam_kernels.core.checks import check_shape, require
from refsam_kernels.core.index_checks import check_finite
from refsam_kernels.core.registration import Operator
from refsam_kernels.mask_postprocess.inputs import Inputs

operator = Operator("mask_postprocess", Inputs)


@operator.forward
def _forward(inputs: Inputs) -> Tensor:
    shape = (inputs.logits.shape[0], *inputs.output_size)
    return inputs.logits.new_empty(shape, dtype=torch.bool)


def mask_postprocess(
    logits: Tensor,
    *,
    image_size: int,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    threshold: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Resizes mask logits to the model's image, crops the padding, resizes to the frame and thresholds.

    Follows `Sam.postprocess_masks` of segment_anything/modeling/sam.py: two bilinear resizes, here without full-size maps of all
    logits. Masks are equal to its except where |logit - threshold| < 1e-5 of the logits' scale. Not differentiable.

    Args:
        logits: (P, 4h, 4w) floating point, finite; computed in float32. P may be 0.
        image_size: side S of the model's square image.
        input_size: (height, width) of the frame within that image, without the padding; at most S.
        output_size: (height, width) of the masks: H, W.
        threshold: logits above it are inside.
        backend: name of the backend; None lets the library choose.

    Returns:
        (P, H, W) bool.

    Raises:
        ValueError: a shape, dtype, size or value does not fit.
        BackendError: the requested backend cannot run.
    """
    check_resize(logits, image_size, input_size)
    check_size("output_size", output_size)
    check_finite("logits", logits)
    sizes = (list(input_size), list(output_size))
    inputs = Inputs(logits.detach().float(), image_size, *sizes, float(threshold))
    return _forward(*inputs, backend or "")


def check_resize(logits: Tensor, image_size: int, input_size: Sequence[int]) -> None:
    """Raises `ValueError` unless these are logits and sizes that can be resized to the image and cropped."""
    check_shape("logits", logits, ("P", "4h", "4w"))
    require(logits.is_floating_point(), "logits", logits.dtype, "a floating point dtype")
    require(min(logits.shape[1:]) > 0, "logits", f"shape {tuple(logits.shape)}", "no empty mask")
    require(image_size > 0, "image_size", image_size, "a positive number of pixels")
    check_size("input_size", input_size)
    inside = max(input_size) <= image_size
    require(inside, "input_size", tuple(input_size), f"at most image_size = {image_size} each")


def check_size(name: str, size: Sequence[int]) -> None:
    """Raises `ValueError` unless it is a positive (height, width)."""
    fits = len(size) == 2 and min(size) > 0
    require(fits, name, tuple(size), "a positive (height, width)")
