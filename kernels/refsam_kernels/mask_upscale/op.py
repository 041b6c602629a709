"""Image features and the hypernetworks' outputs to mask logits, in one step."""

from typing import Any

from torch import Tensor

from refsam_kernels.core.checks import (
    autocast,
    check_same_device,
    check_same_dtype,
    check_shape,
    require,
)
from refsam_kernels.core.flops import Product, counts, linear
from refsam_kernels.core.registration import Operator
from refsam_kernels.mask_upscale.inputs import Inputs

operator = Operator("mask_upscale", Inputs)


@operator.forward
def _forward(inputs: Inputs) -> Tensor:
    features, hyper = inputs.features, inputs.hyper
    return features.new_empty(*hyper.shape[:2], 4 * features.shape[1], 4 * features.shape[2])


operator.differentiate({"grad": "out"}, as_tuple=True)


@counts(operator)
def _products(inputs: Any) -> list[Product]:
    (expressions, h, w, _), (_, masks, channels) = inputs.features, inputs.hyper
    return [
        *linear(expressions * h * w, inputs, "conv1_weight"),
        *linear(4 * expressions * h * w, inputs, "conv2_weight"),
        (2 * expressions * masks * channels * 16 * h * w, None),
    ]


def mask_upscale(
    features: Tensor,
    hyper: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    *,
    feat_s1: Tensor | None = None,
    feat_s0: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Upscales features four times and takes their product with one vector per mask.

    ConvTranspose2d(2, stride 2), LayerNorm2d, GELU, ConvTranspose2d(2, stride 2), GELU, then hyper @ pixels, as
    `MaskDecoder.predict_masks` of segment_anything/modeling/mask_decoder.py; the GELU is the exact one.

    Args:
        features: (P, h, w, C) floating point, channels last.
        hyper: (P, M, C2), the hypernetworks' outputs of the M masks that are wanted; C2 is C/8 in SAM.
        conv1_weight, conv1_bias: (C, C1, 2, 2) and (C1,), as nn.ConvTranspose2d holds them; C1 is C/4 in SAM.
        norm_weight, norm_bias: (C1,), of the LayerNorm over channels.
        conv2_weight, conv2_bias: (C1, C2, 2, 2) and (C2,).
        feat_s1: (P or 1, C1, 2h, 2w), added behind the first convolution, as SAM 2 adds features of higher
            resolution; 1 is shared by all expressions. None adds nothing.
        feat_s0: (P or 1, C2, 4h, 4w), likewise behind the second.
        eps: added to the variance, within the square root.
        backend: name of the backend; None lets the library choose.

    Returns:
        (P, M, 4h, 4w) logits in the dtype of the features, under autocast in autocast's.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: the requested backend cannot run.
    """
    lowered = autocast(
        features, hyper, conv1_weight, conv1_bias, conv2_weight, conv2_bias, feat_s1, feat_s0
    )
    features, hyper, conv1_weight, conv1_bias, conv2_weight, conv2_bias, feat_s1, feat_s0 = lowered
    convolutions = (conv1_weight, conv1_bias, norm_weight, norm_bias, conv2_weight, conv2_bias)
    inputs = Inputs(features, hyper, *convolutions, feat_s1, feat_s0, eps)
    tensors = {name: x for name, x in inputs._asdict().items() if isinstance(x, Tensor)}
    _check(tensors)
    return _forward(*inputs, backend or "")


def _check(tensors: dict[str, Tensor]) -> None:
    features = tensors["features"]
    check_shape("features", features, ("P", "h", "w", "C"))
    expressions, height, width, channels = features.shape
    require(expressions > 0, "features", "no expressions", "at least one")
    shape = f"shape {tuple(features.shape)}"
    require(min(height, width, channels) > 0, "features", shape, "no empty dimension")
    check_shape("conv1_weight", tensors["conv1_weight"], (channels, "C/4", 2, 2))
    middle = tensors["conv1_weight"].shape[1]
    check_shape("conv2_weight", tensors["conv2_weight"], (middle, "C/8", 2, 2))
    last = tensors["conv2_weight"].shape[1]
    check_shape("conv2_bias", tensors["conv2_bias"], (last,))
    for name in ("conv1_bias", "norm_weight", "norm_bias"):
        check_shape(name, tensors[name], (middle,))
    check_shape("hyper", tensors["hyper"], (expressions, "M", last))
    require(tensors["hyper"].shape[1] > 0, "hyper", "no masks", "at least one")
    for name, channels, times in (("feat_s1", middle, 2), ("feat_s0", last, 4)):
        if name in tensors:
            count = 1 if len(tensors[name]) == 1 else expressions
            check_shape(name, tensors[name], (count, channels, times * height, times * width))
    check_same_device(**tensors)
    norm = {name: tensors.pop(name) for name in ("norm_weight", "norm_bias")}
    check_same_dtype(**tensors)
    for name, tensor in norm.items():
        require(tensor.is_floating_point(), name, tensor.dtype, "a floating point dtype")
