"""The mask decoder's upscaling and hypernetwork product, against segment-anything's modules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._feed_forward import bound, exactly, further_than_eager
from benchmarks.registry import Workload, backends_of, register
from refsam_kernels import mask_upscale

Upscale = Callable[..., Tensor]


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


def run(upscale: Upscale, inputs: tuple[Tensor, ...], grad: Tensor | None) -> tuple[Tensor, ...]:
    """The logits; where `grad` is given, gradients to everything too."""
    if grad is None:
        with torch.no_grad():
            return (upscale(*inputs),)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    logits = upscale(*leaves)
    return logits.detach(), *torch.autograd.grad(logits, leaves, grad)


def make_inputs(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random features (P, h, w, C) for one mask each, and the weights of a decoder of C channels."""
    generator = torch.Generator(device).manual_seed(42)
    width = shape[-1]
    middle, last = width // 4, width // 8

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

    return (
        normal(*shape),
        normal(shape[0], 1, last),
        normal(width, middle, 2, 2, scale=width**-0.5),
        normal(middle, scale=0.1),
        1 + normal(middle, scale=0.1),
        normal(middle, scale=0.1),
        normal(middle, last, 2, 2, scale=middle**-0.5),
        normal(last, scale=0.1),
    )


def workload(device: str, *, shape: tuple[int, ...], dtype: torch.dtype, trains: bool) -> Workload:
    """Forward, or forward and backward, of features (P, h, w, C)."""
    inputs = make_inputs(device, shape, dtype)
    expressions, height, width, channels = shape
    logits_shape = (expressions, 1, 4 * height, 4 * width)
    seeded = torch.Generator(device).manual_seed(1)
    drawn = torch.randn(logits_shape, generator=seeded, device=device).to(dtype)
    grad = drawn if trains else None
    ways: dict[str, Upscale] = {"eager": eager}
    if device == "cuda":
        ways["compiled eager"] = torch.compile(eager)
    ways |= {
        name: partial(mask_upscale, backend=name)
        for name in backends_of("mask_upscale", device)
        if name != "reference"
    }
    exact = run(eager, tuple(map(exactly, inputs)), None if grad is None else grad.double())
    plain = run(eager, inputs, grad)
    bounds = [bound(*pair, dtype) for pair in zip(plain, exact, strict=True)]
    # Per pixel: C x 4 (C/4), four times C/4 x 4 (C/8), sixteen times C/8.
    flops = 2 * expressions * height * width * (channels**2 + channels**2 // 2 + 2 * channels)
    shapes: dict[str, Any] = {"features": list(shape), "masks": 1, "dtype": str(dtype)}
    return Workload(
        providers={name: partial(run, way, inputs, grad) for name, way in ways.items()},
        wrong=partial(further_than_eager, exact=exact, bounds=bounds),
        moved_bytes=sum(tensor.nbytes for tensor in (*inputs, *plain)),
        flops=4 * flops if trains else flops,  # again, and two products for every one
        shapes=shapes | {"trains": trains},
        dtype=dtype,
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
