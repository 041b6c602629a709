"""Triton kernels of mask_upscale: a program takes some pixels through one of the four places of the first convolution.

There each pixel has a row of C/4 channels. LayerNorm and GELU act on it in registers, one product gives the second convolution's
four places, and only the masks' logits are written. The backward computes that again and writes the gradient of the first
convolution's results, as many numbers as the features have, from which two plain products make the gradients of features and
first convolution. Every program leaves its sums of the other parameters' gradients, which are added up in their order.

Weights are read as matrices whose columns are ordered by place, then channel; a place is 2 * row + column of the 2 x 2 kernel.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refsam_kernels.core.registration import empty_gradients
from refsam_kernels.core.triton_aot import CompileCase, Launch
from refsam_kernels.core.triton_math import gelu, gelu_derivative, row_statistics

PLACES = 4
# Programs of the backward for each place, for any number of pixels; the order of additions depends on nothing else.
PARTS = 64
MOST_CHANNELS = (128, 64)  # after the first and after the second convolution
MOST_EXPRESSIONS = 65535  # of the second dimension of a grid
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Configuration(NamedTuple):
    """How a kernel is launched: pixels of a program, channels that a product takes at a time, warps, stages."""

    pixels: int
    channels: int
    num_warps: int
    num_stages: int


# By the bytes of a number: products of float32 are not for tensor cores and take the more registers.
FORWARD = {2: Configuration(64, 32, 4, 3), 4: Configuration(32, 16, 8, 1)}
BACKWARD = {2: Configuration(32, 32, 8, 2), 4: Configuration(16, 16, 8, 1)}


@triton.jit
def first_convolution(
    features,  # (pixels, C), of one expression
    weight,  # (C, 4 * C1), from the place's first column on
    bias,  # (C1,)
    pixels,
    is_pixel,
    c1,
    channels,
    width1,
    BLOCK_K: tl.constexpr,
):
    """The results (pixels, C1) in float32; 0 in columns beyond `width1`."""
    is_column = c1 < width1
    x = tl.zeros([pixels.shape[0], c1.shape[0]], dtype=tl.float32)
    for start in range(0, channels, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        is_channel = c < channels
        rows = tl.load(
            features + pixels.to(tl.int64)[:, None] * channels + c[None, :],
            mask=is_pixel[:, None] & is_channel[None, :],
            other=0.0,
        )
        columns = tl.load(
            weight + c[:, None] * (4 * width1) + c1[None, :],
            mask=is_channel[:, None] & is_column[None, :],
            other=0.0,
        )
        x = tl.dot(rows, columns, x)
    return x + tl.load(bias + c1, mask=is_column, other=0.0).to(tl.float32)[None, :]


@triton.jit
def second_weight(weight, c1, q, width1, width2, BLOCK_C2: tl.constexpr):
    """The matrix (C1, 4 * BLOCK_C2) of the second convolution, each place's columns padded with zeros."""
    place, c2 = q // BLOCK_C2, q % BLOCK_C2
    offset = c1[:, None] * (4 * width2) + (place * width2 + c2)[None, :]
    return tl.load(weight + offset, mask=(c1 < width1)[:, None] & (c2 < width2)[None, :], other=0.0)


@triton.jit
def logit_offset(pixels, place1, place2, width):
    """Where in the logits (4h, 4w) of a mask the pixels stand, for places that broadcast against them."""
    row = 4 * (pixels // width) + 2 * (place1 // 2) + place2 // 2
    column = 4 * (pixels % width) + 2 * (place1 % 2) + place2 % 2
    return row.to(tl.int64) * (4 * width) + column


@triton.jit
def _forward_kernel(
    features,  # (P, h * w, C)
    hyper,  # (P, M, C2)
    weight1,  # (C, 4 * C1)
    bias1,  # (C1,)
    norm_weight,  # (C1,)
    norm_bias,  # (C1,)
    weight2,  # (C1, 4 * C2)
    bias2,  # (C2,)
    logits,  # (P, M, 4h, 4w)
    count,
    width,
    channels,
    width1,
    width2,
    masks,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    BLOCK_C2: tl.constexpr,
):
    i_expression = tl.program_id(1).to(tl.int64)
    place1 = tl.program_id(0) % 4
    pixels = tl.program_id(0) // 4 * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pixel = pixels < count
    c1 = tl.arange(0, BLOCK_C1)
    is_column = c1 < width1
    x = first_convolution(
        features + i_expression * count * channels, weight1 + place1 * width1, bias1,
        pixels, is_pixel, c1, channels, width1, BLOCK_K,
    )  # fmt: skip
    mean, deviation = row_statistics(x, is_column[None, :], width1, eps)
    scale = tl.load(norm_weight + c1, mask=is_column, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + c1, mask=is_column, other=0.0).to(tl.float32)
    x = (x - mean[:, None]) * deviation[:, None] * scale[None, :] + shift[None, :]
    q = tl.arange(0, 4 * BLOCK_C2)
    matrix = second_weight(weight2, c1, q, width1, width2, BLOCK_C2)
    y = tl.dot(gelu(x).to(matrix.dtype), matrix)
    c2 = q % BLOCK_C2
    is_last = c2 < width2
    y = gelu(y + tl.load(bias2 + c2, mask=is_last, other=0.0).to(tl.float32)[None, :])
    target = logits + logit_offset(pixels[:, None], place1, tl.arange(0, 4)[None, :], width)
    for mask in range(masks):
        i_mask = i_expression * masks + mask
        vector = tl.load(hyper + i_mask * width2 + c2, mask=is_last, other=0.0).to(tl.float32)
        product = tl.reshape(y * vector[None, :], [BLOCK_P, 4, BLOCK_C2])
        tl.store(target + i_mask * count * 16, tl.sum(product, axis=2), mask=is_pixel[:, None])


@triton.jit
def _backward_kernel(
    grad,  # (P, M, 4h, 4w)
    features,  # (P, h * w, C)
    hyper,  # (P, M, C2)
    weight1,  # (C, 4 * C1)
    bias1,  # (C1,)
    norm_weight,  # (C1,)
    norm_bias,  # (C1,)
    weight2,  # (C1, 4 * C2)
    bias2,  # (C2,)
    grad_x,  # (P, h * w, 4, C1), of the first convolution's results
    grad_hyper,  # (P, tiles, 4, M, C2) float32
    grad_weight2,  # (4, parts, C1, 4 * C2) float32
    grad_bias2,  # (4, parts, 4 * C2) float32
    grad_rows,  # (4, parts, 3, C1) float32: norm_weight, norm_bias, bias1
    expressions,
    tiles,
    count,
    width,
    channels,
    width1,
    width2,
    masks,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    BLOCK_C2: tl.constexpr,
):
    place1, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c1, q = tl.arange(0, BLOCK_C1), tl.arange(0, 4 * BLOCK_C2)
    place2, c2 = q // BLOCK_C2, q % BLOCK_C2
    is_column, is_last = c1 < width1, c2 < width2
    scale = tl.load(norm_weight + c1, mask=is_column, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + c1, mask=is_column, other=0.0).to(tl.float32)
    offset2 = tl.load(bias2 + c2, mask=is_last, other=0.0).to(tl.float32)
    of_weight2 = tl.zeros([BLOCK_C1, 4 * BLOCK_C2], dtype=tl.float32)
    of_bias2 = tl.zeros([4 * BLOCK_C2], dtype=tl.float32)
    of_scale = tl.zeros([BLOCK_C1], dtype=tl.float32)
    of_shift = tl.zeros([BLOCK_C1], dtype=tl.float32)
    of_bias1 = tl.zeros([BLOCK_C1], dtype=tl.float32)
    for turn in range(tl.cdiv(expressions * tiles - part, parts)):
        i_tile = part + turn * parts
        i_expression = (i_tile // tiles).to(tl.int64)
        pixels = i_tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        is_pixel = pixels < count
        x = first_convolution(
            features + i_expression * count * channels, weight1 + place1 * width1, bias1,
            pixels, is_pixel, c1, channels, width1, BLOCK_K,
        )  # fmt: skip
        mean, deviation = row_statistics(x, is_column[None, :], width1, eps)
        normed = tl.where(is_column[None, :], (x - mean[:, None]) * deviation[:, None], 0.0)
        x = normed * scale[None, :] + shift[None, :]
        matrix = second_weight(weight2, c1, q, width1, width2, BLOCK_C2)
        z = gelu(x).to(matrix.dtype)
        y = tl.dot(z, matrix) + offset2[None, :]

        of_y = tl.zeros([BLOCK_P, 4 * BLOCK_C2], dtype=tl.float32)
        source = grad + logit_offset(pixels[:, None], place1, place2[None, :], width)
        target = grad_hyper + (i_tile.to(tl.int64) * 4 + place1) * masks * width2
        for mask in range(masks):
            i_mask = i_expression * masks + mask
            vector = tl.load(hyper + i_mask * width2 + c2, mask=is_last, other=0.0).to(tl.float32)
            of_logit = tl.load(source + i_mask * count * 16, mask=is_pixel[:, None], other=0.0)
            of_logit = of_logit.to(tl.float32)
            of_y += of_logit * vector[None, :]
            of_vector = tl.reshape(tl.sum(of_logit * gelu(y), axis=0), [4, BLOCK_C2])
            last = tl.arange(0, BLOCK_C2)
            tl.store(target + mask * width2 + last, tl.sum(of_vector, axis=0), mask=last < width2)

        of_y *= gelu_derivative(y)
        of_bias2 += tl.sum(of_y, axis=0)
        lowered = of_y.to(matrix.dtype)
        of_weight2 = tl.dot(tl.trans(z), lowered, of_weight2)
        # Read again, not held in registers since its first use.
        matrix = second_weight(weight2, c1, q, width1, width2, BLOCK_C2)
        of_x = tl.dot(lowered, tl.trans(matrix)) * gelu_derivative(x)
        of_scale += tl.sum(of_x * normed, axis=0)
        of_shift += tl.sum(of_x, axis=0)
        of_x *= scale[None, :]
        mean = tl.sum(of_x, axis=1) / width1
        along = tl.sum(of_x * normed, axis=1) / width1
        of_x = (of_x - mean[:, None] - normed * along[:, None]) * deviation[:, None]
        of_x = tl.where(is_column[None, :], of_x, 0.0)
        of_bias1 += tl.sum(of_x, axis=0)
        offset = (i_expression * count + pixels)[:, None] * (4 * width1)
        offset += place1 * width1 + c1[None, :]
        tl.store(grad_x + offset, of_x, mask=is_pixel[:, None] & is_column[None, :])

    i_part = place1 * parts + part
    offset = (i_part * width1 + c1)[:, None] * (4 * width2) + (place2 * width2 + c2)[None, :]
    tl.store(grad_weight2 + offset, of_weight2, mask=is_column[:, None] & is_last[None, :])
    tl.store(grad_bias2 + i_part * 4 * width2 + place2 * width2 + c2, of_bias2, mask=is_last)
    rows = grad_rows + i_part * 3 * width1 + c1
    tl.store(rows, of_scale, mask=is_column)
    tl.store(rows + width1, of_shift, mask=is_column)
    tl.store(rows + 2 * width1, of_bias1, mask=is_column)


def not_supported_reasons(*arguments: Any) -> list[str]:
    """Why these cannot be upscaled here: their dtype, or more channels than fit the registers."""
    features, _, conv1_weight, _, _, _, conv2_weight, *_ = arguments
    reasons = []
    if features.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"computes {names}, got {features.dtype}")
    widths = conv1_weight.shape[1], conv2_weight.shape[1]
    if any(width > most for width, most in zip(widths, MOST_CHANNELS, strict=True)):
        reasons.append(f"takes at most {MOST_CHANNELS} channels in the middle, got {widths}")
    if len(features) > MOST_EXPRESSIONS:
        reasons.append(f"takes at most {MOST_EXPRESSIONS} expressions, got {len(features)}")
    return reasons


def backward_not_supported_reasons(grad: Tensor, *arguments: Any) -> list[str]:
    """Like `not_supported_reasons`."""
    return not_supported_reasons(*arguments[:-1])


def forward(*arguments: Any) -> Tensor:
    """Like `reference.forward`: operands of products in the dtype of the features, everything else in float32."""
    *tensors, eps = arguments
    features, hyper = tensors[:2]
    expressions, height, width, _ = features.shape
    logits = features.new_empty(expressions, hyper.shape[1], 4 * height, 4 * width)
    if logits.numel():
        _forward_launch(_pack(tensors), logits, eps).run()
    return logits


def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Like `reference.backward`."""
    *tensors, eps, needs = arguments
    gradients = list(empty_gradients(tensors, needs))
    if not grad.numel():
        return tuple(gradient.zero_() for gradient in gradients)
    packed = _pack(tensors)
    launch = _backward_launch(grad.contiguous(), packed, eps)
    launch.run()
    found = launch.arguments
    features = packed["features"].flatten(0, 1)
    of_x = found["grad_x"].view(len(features), -1)
    rows = found["grad_rows"].sum(dim=(0, 1))
    made = (
        lambda: of_x @ packed["weight1"].T,
        lambda: found["grad_hyper"].sum(dim=(1, 2)),
        lambda: _unpack(features.T @ of_x),
        lambda: rows[2],
        lambda: rows[0],
        lambda: rows[1],
        lambda: _unpack(found["grad_weight2"].sum(dim=(0, 1))),
        lambda: found["grad_bias2"].sum(dim=(0, 1)).view(PLACES, -1).sum(dim=0),
    )
    for gradient, make, need in zip(gradients, made, needs, strict=True):
        if need:
            gradient.copy_(make().view_as(gradient))
    return tuple(gradients)


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
    for dtype in DTYPES:
        made: dict[str, Any] = {"dtype": dtype, "device": "meta"}
        shapes = (
            (8, 64, 64, 256),
            (8, 1, 32),
            (256, 64, 2, 2),
            (64,),
            (64,),
            (64,),
            (64, 32, 2, 2),
            (32,),
        )
        packed = _pack([torch.empty(shape, **made) for shape in shapes])
        logits = torch.empty(8, 1, 256, 256, **made)
        name = str(dtype).removeprefix("torch.")
        cases += [
            _forward_launch(packed, logits, 1e-6).compile_case(f"forward, {name}"),
            _backward_launch(logits, packed, 1e-6).compile_case(f"backward, {name}"),
        ]
    return cases
