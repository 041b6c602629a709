"""Triton kernels of mask_upscale: a program takes some pixels through one of the four places of the first convolution.

There each pixel has a row of C/4 channels. LayerNorm and GELU act on it in registers, one product gives the second convolution's
four places, and only the masks' logits are written. The backward computes that again and writes the gradient of the first
convolution's results, as many numbers as the features have, from which two plain products make the gradients of features and
first convolution. Every program leaves its sums of the other parameters' gradients, which are added up in their order.

Weights are read as matrices whose columns are ordered by place, then channel; a place is 2 * row + column of the 2 x 2 kernel.
"""

import triton
import triton.language as tl

from refsam_kernels.core.triton_math import gelu, gelu_derivative, row_statistics


@triton.jit
def first_convolution(
    features,  # (pixels, C), of one expression
    weight,  # (C, 4 * C1), from the place's first column on
    bias,  # (C1,)
    pixels, is_pixel, c1, channels, width1,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
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
    """Offsets of the pixels in a mask's logits (4h, 4w), for places that broadcast against them."""
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
    count, width, channels, width1, width2, masks, eps,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C1: tl.constexpr, BLOCK_C2: tl.constexpr,
):  # fmt: skip
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
    expressions, tiles, count, width, channels, width1, width2, masks, eps,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C1: tl.constexpr, BLOCK_C2: tl.constexpr,
):  # fmt: skip
    place1, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c1, q = tl.arange(0, BLOCK_C1), tl.arange(0, 4 * BLOCK_C2)
    place2, c2 = q // BLOCK_C2, q % BLOCK_C2
    is_column, is_last = c1 < width1, c2 < width2
    scale = tl.load(norm_weight + c1, mask=is_column, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + c1, mask=is_column, other=0.0).to(tl.float32)
    offset2 = tl.load(bias2 + c2, mask=is_last, other=0.0).to(tl.float32)
    d_weight2 = tl.zeros([BLOCK_C1, 4 * BLOCK_C2], dtype=tl.float32)
    d_bias2 = tl.zeros([4 * BLOCK_C2], dtype=tl.float32)
    d_scale = tl.zeros([BLOCK_C1], dtype=tl.float32)
    d_shift = tl.zeros([BLOCK_C1], dtype=tl.float32)
    d_bias1 = tl.zeros([BLOCK_C1], dtype=tl.float32)
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

        d_y = tl.zeros([BLOCK_P, 4 * BLOCK_C2], dtype=tl.float32)
        source = grad + logit_offset(pixels[:, None], place1, place2[None, :], width)
        target = grad_hyper + (i_tile.to(tl.int64) * 4 + place1) * masks * width2
        for mask in range(masks):
            i_mask = i_expression * masks + mask
            vector = tl.load(hyper + i_mask * width2 + c2, mask=is_last, other=0.0).to(tl.float32)
            d_logit = tl.load(source + i_mask * count * 16, mask=is_pixel[:, None], other=0.0)
            d_logit = d_logit.to(tl.float32)
            d_y += d_logit * vector[None, :]
            d_vector = tl.reshape(tl.sum(d_logit * gelu(y), axis=0), [4, BLOCK_C2])
            last = tl.arange(0, BLOCK_C2)
            tl.store(target + mask * width2 + last, tl.sum(d_vector, axis=0), mask=last < width2)

        d_y *= gelu_derivative(y)
        d_bias2 += tl.sum(d_y, axis=0)
        lowered = d_y.to(matrix.dtype)
        d_weight2 = tl.dot(tl.trans(z), lowered, d_weight2)
        # Read again, not held in registers since its first use.
        matrix = second_weight(weight2, c1, q, width1, width2, BLOCK_C2)
        d_x = tl.dot(lowered, tl.trans(matrix)) * gelu_derivative(x)
        d_scale += tl.sum(d_x * normed, axis=0)
        d_shift += tl.sum(d_x, axis=0)
        d_x *= scale[None, :]
        mean = tl.sum(d_x, axis=1) / width1
        along = tl.sum(d_x * normed, axis=1) / width1
        d_x = (d_x - mean[:, None] - normed * along[:, None]) * deviation[:, None]
        d_x = tl.where(is_column[None, :], d_x, 0.0)
        d_bias1 += tl.sum(d_x, axis=0)
        offset = (i_expression * count + pixels)[:, None] * (4 * width1)
        offset += place1 * width1 + c1[None, :]
        tl.store(grad_x + offset, d_x, mask=is_pixel[:, None] & is_column[None, :])

    i_part = place1 * parts + part
    offset = (i_part * width1 + c1)[:, None] * (4 * width2) + (place2 * width2 + c2)[None, :]
    tl.store(grad_weight2 + offset, d_weight2, mask=is_column[:, None] & is_last[None, :])
    tl.store(grad_bias2 + i_part * 4 * width2 + place2 * width2 + c2, d_bias2, mask=is_last)
    rows = grad_rows + i_part * 3 * width1 + c1
    tl.store(rows, d_scale, mask=is_column)
    tl.store(rows + width1, d_shift, mask=is_column)
    tl.store(rows + 2 * width1, d_bias1, mask=is_column)
