"""Other libraries' mask decoders: their upscaling by `mask_upscale`, when it may stand for theirs, and masks of their logits."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from refsam_kernels.mask_postprocess.op import mask_postprocess
from refsam_kernels.mask_upscale.op import mask_upscale


def upscaling_reasons(
    path: str, conv1: Any, norm: Any, activations: Sequence[Any], conv2: Any
) -> Iterator[str]:
    """Why `upscale` cannot stand for these modules of a SAM mask decoder."""
    for name, conv in (("first", conv1), ("second", conv2)):
        is_plain = type(conv) is nn.ConvTranspose2d and conv.bias is not None
        if not is_plain or (conv.kernel_size, conv.stride, conv.padding) != (
            (2, 2),
            (2, 2),
            (0, 0),
        ):
            wanted = "ConvTranspose2d of kernel 2, stride 2, with a bias"
            yield f"{path}, its {name} convolution: got {conv}, wanted a {wanted}"
    if {name for name, _ in norm.named_parameters()} != {"weight", "bias"}:
        yield f"{path}, its norm: got a {type(norm).__name__}, wanted one with weight and bias"
    for activation in activations:
        if type(activation) is not nn.GELU or activation.approximate != "none":
            yield f"{path}, its activation: got {activation}, wanted the exact GELU"


def upscale(
    features: Tensor,
    hyper: Tensor,
    conv1: Any,
    norm: Any,
    conv2: Any,
    *,
    feat_s1: Tensor | None = None,
    feat_s0: Tensor | None = None,
) -> Tensor:
    """Tokens (P, h, w, C) and hypernetworks' outputs (P, M, C/8) to logits (P, M, 4h, 4w).

    The modules' parameters are read, the modules not called. `feat_s1` and `feat_s0` are those of `mask_upscale`.
    """
    return mask_upscale(
        features,
        hyper,
        conv1.weight,
        conv1.bias,
        norm.weight,
        norm.bias,
        conv2.weight,
        conv2.bias,
        feat_s1=feat_s1,
        feat_s0=feat_s0,
        eps=norm.eps,
    )


def to_masks(
    logits: Tensor,
    output_size: Sequence[int],
    threshold: float,
    *,
    image_size: int | None = None,
    input_size: Sequence[int] | None = None,
) -> Tensor:
    """Logits (P, M, h, w) to masks (P, M, H, W) bool of the output size, by `mask_postprocess`, whose sizes these are.

    Without image and input sizes square logits show the whole image.
    """
    side = image_size or logits.shape[-1]
    height, width = output_size
    rows, columns = input_size or (side, side)
    masks = mask_postprocess(
        logits.flatten(0, 1),
        image_size=side,
        input_size=(rows, columns),
        output_size=(height, width),
        threshold=threshold,
    )
    return masks.unflatten(0, logits.shape[:2])
