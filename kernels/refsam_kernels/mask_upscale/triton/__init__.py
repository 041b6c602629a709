"""`mask_upscale` in Triton: its launches; see `kernels`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from refsam_kernels.core.reasons import KERNEL_DTYPES, dtype_reasons, limit_reasons, short
from refsam_kernels.core.triton_aot import CompileCase, Launch
from refsam_kernels.mask_upscale.inputs import Inputs
from refsam_kernels.mask_upscale.triton.kernels import _backward_kernel, _forward_kernel

PLACES = 4
# Programs of the backward for each place, for any number of pixels; the order of additions depends on nothing else.
PARTS = 64
MOST_CHANNELS = (128, 64)  # after the first and after the second convolution
MOST_EXPRESSIONS = 65535  # of the second dimension of a grid


class Configuration(NamedTuple):
    """Launch configuration: pixels of a program, channels that a product takes at a time, warps, stages."""

    pixels: int
    channels: int
    num_warps: int
    num_stages: int


# By the bytes of a number: products of float32 use no tensor cores and need more registers.
FORWARD = {2: Configuration(64, 32, 4, 3), 4: Configuration(32, 16, 8, 1)}
BACKWARD = {2: Configuration(32, 32, 8, 2), 4: Configuration(16, 16, 8, 1)}


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernels cannot compute these: their dtype, or more channels than fit the registers."""
    features = inputs.features
    reasons = dtype_reasons(KERNEL_DTYPES, features)
    if inputs.feat_s1 is not None or inputs.feat_s0 is not None:
        reasons.append("adds no features of higher resolution (feat_s1, feat_s0)")
    width1, width2 = inputs.conv1_weight.shape[1], inputs.conv2_weight.shape[1]
    return reasons + limit_reasons(
        ("channels after the first convolution", width1, MOST_CHANNELS[0]),
        ("channels after the second convolution", width2, MOST_CHANNELS[1]),
        ("expressions", len(features), MOST_EXPRESSIONS),
    )


def forward(inputs: Inputs) -> Tensor:
    """Like `reference.forward`: operands of products in the dtype of the features, everything else in float32."""
    features, hyper, *_ = inputs
    expressions, height, width, _ = features.shape
    logits = features.new_empty(expressions, hyper.shape[1], 4 * height, 4 * width)
    _forward_launch(_pack(inputs[:8]), logits, inputs.eps).run()
    return logits


def backward(
    inputs: Inputs, outputs: None, grads: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Like `reference.backward`."""
    packed = _pack(inputs[:8])
    launch = _backward_launch(grads[0].contiguous(), packed, inputs.eps)
    launch.run()
    found = launch.arguments
    features = packed["features"].flatten(0, 1)
    grad_columns = found["grad_x"].view(len(features), -1)
    norm_weight, norm_bias, bias1 = found["grad_rows"].sum(dim=(0, 1))
    return (
        grad_columns @ packed["weight1"].T if needs[0] else None,
        found["grad_hyper"].sum(dim=(1, 2)),
        _unpack(features.T @ grad_columns) if needs[2] else None,
        bias1,
        norm_weight,
        norm_bias,
        _unpack(found["grad_weight2"].sum(dim=(0, 1))),
        found["grad_bias2"].sum(dim=(0, 1)).view(PLACES, -1).sum(dim=0),
        None,
        None,
    )


def _pack(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The operator's tensors as the kernels read them."""
    features, hyper, weight1, bias1, norm_weight, norm_bias, weight2, bias2 = tensors
    weights = (weight.permute(0, 2, 3, 1).flatten(1) for weight in (weight1, weight2))
    named = {
        "features": features.flatten(1, 2),
        "hyper": hyper,
        **dict(zip(("weight1", "weight2"), weights, strict=True)),
        "bias1": bias1,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "bias2": bias2,
    }
    return {name: tensor.contiguous() for name, tensor in named.items()}


def _unpack(matrix: Tensor) -> Tensor:
    """(in, 2 * 2 * out) -> (in, out, 2, 2), as nn.ConvTranspose2d holds weights."""
    return matrix.view(len(matrix), 2, 2, -1).permute(0, 3, 1, 2)


def _launch(
    kernel: Any,
    programs: tuple[int, int],
    configuration: Configuration,
    packed: dict[str, Tensor],
    arguments: dict[str, Any],
    eps: float,
) -> Launch:
    """A launch with the tensors and numbers that both kernels take, and `arguments`."""
    width1, width2 = len(packed["bias1"]), len(packed["bias2"])
    sizes = {
        "count": packed["features"].shape[1],
        "channels": packed["features"].shape[2],
        "width1": width1,
        "width2": width2,
        "masks": packed["hyper"].shape[1],
        "eps": eps,
        "BLOCK_P": configuration.pixels,
        "BLOCK_K": configuration.channels,
        # A product takes 16 columns at least.
        "BLOCK_C1": max(16, triton.next_power_of_2(width1)),
        "BLOCK_C2": max(4, triton.next_power_of_2(width2)),
    }
    return Launch(kernel, programs, packed | sizes | arguments, *configuration[2:])


def _forward_launch(packed: dict[str, Tensor], logits: Tensor, eps: float) -> Launch:
    expressions, count, _ = packed["features"].shape
    configuration = FORWARD[logits.itemsize]
    programs = (PLACES * triton.cdiv(count, configuration.pixels), expressions)
    arguments = {"logits": logits, "width": logits.shape[3] // 4}
    return _launch(_forward_kernel, programs, configuration, packed, arguments, eps)


def _backward_launch(grad: Tensor, packed: dict[str, Tensor], eps: float) -> Launch:
    expressions, count, _ = packed["features"].shape
    masks, width1, width2 = grad.shape[1], len(packed["bias1"]), len(packed["bias2"])
    configuration = BACKWARD[grad.itemsize]
    tiles = triton.cdiv(count, configuration.pixels)
    parts = min(PARTS, expressions * tiles)
    arguments = {
        "grad": grad,
        "width": grad.shape[3] // 4,
        "expressions": expressions,
        "tiles": tiles,
        "grad_x": grad.new_empty(expressions, count, PLACES, width1),
        "grad_hyper": _float32(grad, expressions, tiles, PLACES, masks, width2),
        "grad_weight2": _float32(grad, PLACES, parts, width1, PLACES * width2),
        "grad_bias2": _float32(grad, PLACES, parts, PLACES * width2),
        "grad_rows": _float32(grad, PLACES, parts, 3, width1),
    }
    return _launch(_backward_kernel, (PLACES, parts), configuration, packed, arguments, eps)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def compile_cases() -> list[CompileCase]:
    """SAM's decoder in every dtype."""
    cases = []
    for dtype in KERNEL_DTYPES:
        made: dict[str, Any] = {"dtype": dtype, "device": "meta"}
        convolutions = ((256, 64, 2, 2), (64,), (64,), (64,), (64, 32, 2, 2), (32,))
        shapes = ((8, 64, 64, 256), (8, 1, 32), *convolutions)
        packed = _pack([torch.empty(shape, **made) for shape in shapes])
        logits = torch.empty(8, 1, 256, 256, **made)
        name = short(dtype)
        cases += [
            _forward_launch(packed, logits, 1e-6).compile_case(f"forward, {name}"),
            _backward_launch(logits, packed, 1e-6).compile_case(f"backward, {name}"),
        ]
    return cases
