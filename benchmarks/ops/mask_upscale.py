"""The mask decoder's upscaling and hypernetwork product, against segment-anything's modules."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._eager import against_eager
from benchmarks.registry import Workload, register
from refsam_kernels import mask_upscale


def eager(
    features: Tensor,
    hyper: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
) -> Tensor:
    """Transposed convolutions and LayerNorm2d on (P, C, h, w), as segment-anything's MaskDecoder."""
    x = F.conv_transpose2d(features.permute(0, 3, 1, 2), conv1_weight, conv1_bias, stride=2)
    centred = x - x.mean(1, keepdim=True)
    x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
    x = F.gelu(norm_weight[:, None, None] * x + norm_bias[:, None, None])
    x = F.gelu(F.conv_transpose2d(x, conv2_weight, conv2_bias, stride=2))
    return (hyper @ x.flatten(2)).unflatten(2, x.shape[2:])


def make_inputs(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Random features (P, h, w, C) for one mask each, and the weights of a decoder of C channels."""
    generator = torch.Generator(device).manual_seed(42)
    width = shape[-1]
    middle, last = width // 4, width // 8

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

    return {
        "features": normal(*shape),
        "hyper": normal(shape[0], 1, last),
        "conv1_weight": normal(width, middle, 2, 2, scale=width**-0.5),
        "conv1_bias": normal(middle, scale=0.1),
        "norm_weight": 1 + normal(middle, scale=0.1),
        "norm_bias": normal(middle, scale=0.1),
        "conv2_weight": normal(middle, last, 2, 2, scale=middle**-0.5),
        "conv2_bias": normal(last, scale=0.1),
    }


def workload(device: str, *, shape: tuple[int, ...], dtype: torch.dtype, trains: bool) -> Workload:
    """Forward, or forward and backward, of features (P, h, w, C)."""
    inputs = make_inputs(device, shape, dtype)
    expressions, height, width, channels = shape
    for tensor in inputs.values():
        tensor.requires_grad_(trains)
    # Per pixel: C x 4 (C/4), four times C/4 x 4 (C/8), sixteen times C/8.
    flops = 2 * expressions * height * width * (channels**2 + channels**2 // 2 + 2 * channels)
    return against_eager(
        "mask_upscale",
        eager,
        mask_upscale,
        inputs,
        flops=4 * flops if trains else flops,  # again, and two products for every one
        shapes={"features": list(shape), "masks": 1, "dtype": str(dtype), "trains": trains},
        dtype=dtype,
        with_compiled=True,
    )


SAM, NANO = (64, 64, 256), (24, 24, 128)
for name, shape, dtype, trains in (
    ("1 expression, float32", (1, *SAM), torch.float32, False),
    ("8 expressions, float32", (8, *SAM), torch.float32, False),
    ("8 expressions, bfloat16", (8, *SAM), torch.bfloat16, False),
    ("8 expressions, trained, float32", (8, *SAM), torch.float32, True),
    ("8 expressions, trained, bfloat16", (8, *SAM), torch.bfloat16, True),
    ("nano, 8 expressions, float32", (8, *NANO), torch.float32, False),
    ("nano, 8 expressions, trained, float32", (8, *NANO), torch.float32, True),
):
    make = partial(workload, shape=shape, dtype=dtype, trains=trains)
    register("mask_upscale", name, baseline="eager")(make)
