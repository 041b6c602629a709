"""Hierarchical dense attention of all expressions, against the formula level by level with torch's functions."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._eager import against_eager
from benchmarks.registry import Workload, register
from refsam_kernels import dense_attention


def eager(
    features: Tensor,
    text: Tensor,
    lengths: Tensor,
    image_index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    level_weights: Tensor,
) -> Tensor:
    """The formula with the concatenation, all expressions at once."""
    words = torch.arange(text.shape[1], device=text.device)
    padding = (words >= lengths[:, None])[:, None]
    dense = text.new_zeros(())
    for level, share in zip(features, level_weights, strict=True):
        pixels = level[image_index]
        logits = (pixels @ text.mT * scale).masked_fill(padding, float("-inf"))
        attended = logits.softmax(-1).to(text.dtype) @ text
        dense = dense + share * F.linear(torch.cat([pixels, attended], -1), weight, bias)
    return dense.to(features.dtype)


def make_inputs(
    device: str, images: int, pixels: int, channels: int, expressions: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Four levels; up to eleven words and the sentence."""
    generator = torch.Generator(device).manual_seed(42)
    normal = partial(torch.randn, generator=generator, device=device)
    text = F.normalize(normal(expressions, 12, channels), dim=-1)
    inputs = {
        "features": F.normalize(normal(4, images, pixels, channels), dim=-1).to(dtype),
        "text": text.to(dtype),
        "lengths": torch.randint(4, 13, (expressions,), generator=generator, device=device),
        "image_index": torch.arange(expressions) % images,
        "weight": (normal(channels, 2 * channels) * channels**-0.5).to(dtype),
        "bias": normal(channels).to(dtype),
        "scale": torch.tensor(10.0),
        "level_weights": normal(4).softmax(0),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def workload(
    device: str,
    *,
    images: int,
    pixels: int,
    channels: int,
    expressions: int,
    dtype: torch.dtype,
    trains: bool,
) -> Workload:
    """Inference, or forward and backward to everything."""
    inputs = make_inputs(device, images, pixels, channels, expressions, dtype)
    for tensor in inputs.values():
        tensor.requires_grad_(trains and tensor.is_floating_point())
    flops = 2 * images * pixels * channels**2 + 4 * expressions * pixels * 12 * channels * 3
    return against_eager(
        "dense_attention",
        eager,
        dense_attention,
        inputs,
        flops=3 * flops if trains else flops,
        shapes={name: list(inputs[name].shape) for name in ("features", "text")},
        dtype=dtype,
    )


VIT_B: dict[str, Any] = {"images": 1, "pixels": 4096, "channels": 256}
NANO: dict[str, Any] = {"images": 24, "pixels": 576, "channels": 128}
for name, sizes, expressions, trains in (
    ("ViT-B, 1 expression", VIT_B, 1, False),
    ("ViT-B, 8 expressions", VIT_B, 8, False),
    ("nano, 48 expressions, training", NANO, 48, True),
):
    for dtype in (torch.float32, torch.bfloat16):
        make = partial(workload, **sizes, expressions=expressions, dtype=dtype, trains=trains)
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        register("dense_attention", label, baseline="eager")(make)
