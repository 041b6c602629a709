"""The upscaling of other libraries' mask decoders by `mask_upscale`, and when it may stand for theirs."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

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
