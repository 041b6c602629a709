"""Cross attention between tokens and image, both directions, against the same with torch's functions."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._eager import against_eager
from benchmarks.registry import Workload, register
from refsam_kernels import AttentionWeights, token_image_attention

TOKENS = 15  # five of the decoder's own, and ten words


def eager(
    queries: Tensor,
    keys: Tensor,
    query_pe: Tensor,
    key_pe: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_lengths: Tensor | None,
    num_heads: int,
    **weights: Tensor,
) -> Tensor:
    """As segment-anything has it, with torch's fused attention."""
    w = AttentionWeights(**weights)
    q = F.linear(queries + query_pe, w.q_weight, w.q_bias)
    k = F.linear(keys + key_pe, w.k_weight, w.k_bias)
    v = F.linear(keys, w.v_weight, w.v_bias)
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    valid = None
    if key_lengths is not None:
        positions = torch.arange(keys.shape[1], device=keys.device)
        valid = (positions < key_lengths[:, None])[:, None, None]
    attended = F.scaled_dot_product_attention(q, k, v, valid).transpose(1, 2).flatten(2)
    x = queries + F.linear(attended, w.out_weight, w.out_bias)
    return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)


def fused(backend: str, **inputs: Any) -> Tensor:
    """The operator, on tensors by name."""
    weights = AttentionWeights(*(inputs.pop(name) for name in AttentionWeights._fields))
    return token_image_attention(weights=weights, backend=backend, **inputs)


def make_inputs(
    device: str, pixels: int, channels: int, expressions: int, dtype: torch.dtype, to_image: bool
) -> dict[str, Any]:
    """Everything in `dtype`; heads of 16 channels."""
    generator = torch.Generator(device).manual_seed(42)
    normal = partial(torch.randn, generator=generator, device=device)
    internal = channels // 2
    tokens, token_pe = (normal(expressions, TOKENS, channels) for _ in range(2))
    image, image_pe = normal(expressions, pixels, channels), normal(1, pixels, channels)
    pairs = {"queries": (tokens, image), "query_pe": (token_pe, image_pe)}
    pairs |= {"keys": (image, tokens), "key_pe": (image_pe, token_pe)}
    inputs: dict[str, Any] = {name: pair[not to_image] for name, pair in pairs.items()}
    for name in AttentionWeights._fields:
        shape = (channels, internal) if name.startswith("out") else (internal, channels)
        size = shape[1] ** -0.5 if name.endswith("weight") else 1.0
        inputs[name] = normal(shape[: 2 if name.endswith("weight") else 1]) * size
    inputs |= {"norm_weight": 1 + 0.1 * normal(channels), "norm_bias": 0.1 * normal(channels)}
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    lengths = torch.randint(7, TOKENS + 1, (expressions,), generator=generator, device=device)
    return inputs | {"key_lengths": None if to_image else lengths.to(device)}


def workload(
    device: str,
    *,
    pixels: int,
    channels: int,
    expressions: int,
    dtype: torch.dtype,
    to_image: bool,
    trains: bool,
) -> Workload:
    """Inference, or forward and backward to everything but the image's positions."""
    inputs = make_inputs(device, pixels, channels, expressions, dtype, to_image)
    fixed = ("key_pe" if to_image else "query_pe", "key_lengths")
    for name, tensor in inputs.items():
        if name not in fixed:
            tensor.requires_grad_(trains)
    lengths = {"key_lengths": inputs.pop("key_lengths"), "num_heads": channels // 32}
    flops = expressions * (pixels + TOKENS) * 4 * channels * (channels // 2)
    flops += expressions * pixels * TOKENS * 4 * (channels // 2)
    return against_eager(
        "token_image_attention",
        partial(eager, **lengths),
        partial(fused, **lengths),
        inputs,
        flops=3 * flops if trains else flops,
        shapes={name: list(inputs[name].shape) for name in ("queries", "keys")},
        dtype=dtype,
        zeros={"k_bias": "q_bias"},
    )


VIT_B: dict[str, Any] = {"pixels": 4096, "channels": 256}
NANO: dict[str, Any] = {"pixels": 576, "channels": 128}
for name, sizes, expressions, trains in (
    ("ViT-B, 1 expression", VIT_B, 1, False),
    ("ViT-B, 8 expressions", VIT_B, 8, False),
    ("nano, 48 expressions, training", NANO, 48, True),
):
    for dtype in (torch.float32, torch.bfloat16):
        for direction, to_image in (("tokens to image", True), ("image to tokens", False)):
            make = partial(
                workload,
                **sizes,
                expressions=expressions,
                dtype=dtype,
                to_image=to_image,
                trains=trains,
            )
            label = f"{direction}, {name}, {str(dtype).removeprefix('torch.')}"
            register("token_image_attention", label, baseline="eager")(make)
