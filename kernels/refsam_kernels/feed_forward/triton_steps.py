"""The steps between the matrix products of `adapter_mlp` and `adapter_projection`, in Triton.

Three kernels: a sum with its layer norm; its backward, with the row sums for the biases and the norm; the GELU's backward, which
also recomputes the GELU and sums a bias's gradient. Row sums are partial sums of fixed rows, added in a fixed
order without atomics. Tensors are contiguous, statistics and sums float32, offsets 64 bits.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refsam_kernels.core.reasons import KERNEL_DTYPES, short
from refsam_kernels.core.triton_aot import CompileCase, Launch
from refsam_kernels.core.triton_math import gelu, gelu_derivative, row_statistics
from refsam_kernels.feed_forward import torch_steps
from refsam_kernels.feed_forward.torch_steps import (
    Normed,
    Steps,
    Sum,
    SumBackward,
    SumGradients,
    empty_statistics,
    rows,
    sum_dtype,
)

# A tile of whole rows has 16 elements of each tensor per thread, or one row.
TILE_ELEMENTS = 2048
# Tiles whose sums one program of the backward keeps in registers.
TILES_PER_PROGRAM = 8
GELU_ROWS, GELU_COLUMNS = 16, 128
STAGES = 3  # of the compiler's pipeline


@triton.jit
def _add_and_norm_kernel(
    residual_ptr,  # (rows, width)
    first_ptr,  # (rows, width)
    second_ptr,  # (second_rows, width)
    norm_weight_ptr,  # (width,)
    norm_bias_ptr,  # (width,)
    x_ptr,  # (rows, width)
    normed_ptr,  # (rows, width)
    mean_ptr,  # (rows,) float32
    rstd_ptr,  # (rows,) float32
    row_count,
    second_rows,  # row_count or 0
    width, scale, eps,
    HAS_NORM: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row, is_column = row < row_count, column < width
    inside = is_row[:, None] & is_column[None, :]
    offset = row[:, None] * width + column[None, :]
    x = tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(first_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    # With and without a second term the same instructions run, so one of zeros changes no bit.
    has_second = (row < second_rows)[:, None] & is_column[None, :]
    second = tl.load(second_ptr + offset, mask=has_second, other=0.0).to(tl.float32)
    rounded = (x + scale * second).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + offset, rounded, mask=inside)
    if HAS_NORM:
        x = rounded.to(tl.float32)
        mean, rstd = row_statistics(x, inside, width, eps)
        weight = tl.load(norm_weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        normed = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=inside)
        if KEEP:
            tl.store(mean_ptr + row, mean, mask=is_row)
            tl.store(rstd_ptr + row, rstd, mask=is_row)


@triton.jit
def _add_and_norm_backward_kernel(
    grad_x_ptr,  # (rows, width)
    grad_normed_ptr,  # (rows, width)
    x_ptr,  # (rows, width)
    mean_ptr,  # (rows,) float32
    rstd_ptr,  # (rows,) float32
    norm_weight_ptr,  # (width,)
    total_ptr,  # (rows, width)
    operand_ptr,  # (rows, width), None where total has its dtype
    column_sums_ptr,  # (programs, width) float32 partial sums over rows of total, or None
    weight_sums_ptr,  # (row tiles, width) float32 partial sums of the gradient of the norm's weight, or None
    bias_sums_ptr,  # (row tiles, width) float32 partial sums of the gradient of the norm's bias, or None
    row_count, width,
    TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """TILES tiles of ROWS whole rows, one after the other, and their sums."""
    column = tl.arange(0, COLUMNS)
    is_column = column < width
    weight = tl.load(norm_weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    column_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    first_row = tl.program_id(0).to(tl.int64) * (TILES * ROWS)
    for tile in range(TILES):
        row = first_row + tile * ROWS + tl.arange(0, ROWS)
        is_row = row < row_count
        inside = is_row[:, None] & is_column[None, :]
        offset = row[:, None] * width + column[None, :]
        mean = tl.load(mean_ptr + row, mask=is_row, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)[:, None]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        grad_normed = tl.load(grad_normed_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        standard = (x - mean) * rstd
        scaled = grad_normed * weight[None, :]
        along = tl.sum(scaled * standard, 1)[:, None] / width
        level = tl.sum(scaled, 1)[:, None] / width
        total = rstd * (scaled - standard * along - level)
        total += tl.load(grad_x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(total_ptr + offset, total.to(total_ptr.dtype.element_ty), mask=inside)
        if operand_ptr is not None:
            tl.store(operand_ptr + offset, total.to(operand_ptr.dtype.element_ty), mask=inside)
        if column_sums_ptr is not None:
            column_sum += tl.where(inside, total, 0.0)
        weight_sum += grad_normed * standard
        bias_sum += grad_normed
    partial = tl.program_id(0).to(tl.int64) * width + column
    if column_sums_ptr is not None:
        tl.store(column_sums_ptr + partial, tl.sum(column_sum, 0), mask=is_column)
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + partial, tl.sum(weight_sum, 0), mask=is_column)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + partial, tl.sum(bias_sum, 0), mask=is_column)


@triton.jit
def _gelu_backward_kernel(
    grad_ptr,  # (rows, width): the gradient of gelu(hidden), overwritten by hidden's
    hidden_ptr,  # (rows, width)
    activated_ptr,  # (rows, width) for gelu(hidden), or None
    column_sums_ptr,  # (row tiles, width) float32 partial sums over rows of hidden's gradient, or None
    row_count, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows and COLUMNS columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < row_count)[:, None] & (column < width)[None, :]
    offset = row[:, None] * width + column[None, :]
    hidden = tl.load(hidden_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad *= gelu_derivative(hidden)
    tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    if activated_ptr is not None:
        activated = gelu(hidden).to(activated_ptr.dtype.element_ty)
        tl.store(activated_ptr + offset, activated, mask=inside)
    if column_sums_ptr is not None:
        partial = tl.program_id(0).to(tl.int64) * width + column
        tl.store(column_sums_ptr + partial, tl.sum(grad, 0), mask=column < width)


def row_tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of whole rows, and the number of warps for it."""
    columns = triton.next_power_of_2(width)
    count = max(1, TILE_ELEMENTS // columns)
    return count, columns, max(4, count * columns // 512)


def add_and_norm_launch(terms: Sum) -> tuple[Launch, Normed]:
    """The launch that computes `torch_steps.add_and_norm`, and its results, still empty."""
    made: Any = [x.contiguous() if isinstance(x, Tensor) else x for x in terms]
    terms = Sum(*made)
    residual, first, has_norm = terms.residual, terms.first, terms.norm_weight is not None
    x = residual.new_empty(residual.shape, dtype=sum_dtype(residual, first))
    normed = torch.empty_like(first) if has_norm else None
    results = Normed(x, normed, *empty_statistics(x, terms.keep and has_norm))
    count, width = rows(x).shape
    tile_rows, columns, num_warps = row_tile(width)
    values = {
        **terms._asdict(),
        **results._asdict(),
        "second": first if terms.second is None else terms.second,
        "row_count": count,
        "second_rows": 0 if terms.second is None else count,
        "width": width,
        "HAS_NORM": has_norm,
        "KEEP": terms.keep,
        "ROWS": tile_rows,
        "COLUMNS": columns,
    }
    programs = (triton.cdiv(count, tile_rows),)
    return Launch.choosing(_add_and_norm_kernel, programs, values, num_warps, STAGES), results


def add_and_norm(terms: Sum) -> Normed:
    """`torch_steps.add_and_norm` in one pass over the rows."""
    launch, results = add_and_norm_launch(terms)
    launch.run()
    return results


def add_and_norm_backward_launch(
    inputs: SumBackward,
) -> tuple[Launch, Tensor, Tensor, list[Tensor | None]]:
    """The launch of the backward, and still empty: the sum's gradient in both dtypes, partial sums (programs, width)."""
    x, dtype, norm_weight = inputs.x, inputs.dtype, inputs.norm_weight
    needs_sums = (inputs.needs_column_sum, *inputs.needs_norm)
    total = torch.empty_like(rows(x))
    operand = total if dtype == x.dtype else torch.empty_like(total, dtype=dtype)
    count, width = total.shape
    tile_rows, columns, num_warps = row_tile(width)
    programs = triton.cdiv(count, tile_rows * TILES_PER_PROGRAM)
    sums = [
        x.new_empty((programs, width), dtype=torch.float32) if needed else None
        for needed in needs_sums
    ]
    values = {
        **inputs._asdict(),
        "grad_x": inputs.grad_x.contiguous(),
        "grad_normed": inputs.grad_normed.contiguous(),
        "norm_weight": None if norm_weight is None else norm_weight.contiguous(),
        "total": total,
        "operand": None if operand is total else operand,
        "column_sums": sums[0],
        "weight_sums": sums[1],
        "bias_sums": sums[2],
        "row_count": count,
        "width": width,
        "TILES": TILES_PER_PROGRAM,
        "ROWS": tile_rows,
        "COLUMNS": columns,
    }
    kernel = _add_and_norm_backward_kernel
    launch = Launch.choosing(kernel, (programs,), values, num_warps, STAGES)
    return launch, total, operand, sums


def add_and_norm_backward(inputs: SumBackward) -> SumGradients:
    """`torch_steps.add_and_norm_backward` in one pass over the rows, and one over partial sums."""
    if inputs.norm_weight is None:
        return torch_steps.add_and_norm_backward(inputs)
    launch, total, operand, sums = add_and_norm_backward_launch(inputs)
    launch.run()
    return SumGradients(total, operand, *map(added, sums))


def gelu_backward_launch(
    grad: Tensor, hidden: Tensor, needs_activated: bool, needs_column_sum: bool
) -> tuple[Launch, Tensor | None, Tensor | None]:
    """The launch of the backward in place of `grad`, and still empty: gelu(hidden), partial sums (programs, width)."""
    count, width = hidden.shape
    programs = (triton.cdiv(count, GELU_ROWS), triton.cdiv(width, GELU_COLUMNS))
    activated = torch.empty_like(hidden) if needs_activated else None
    shape = (programs[0], width)
    sums = hidden.new_empty(shape, dtype=torch.float32) if needs_column_sum else None
    arguments = {
        "grad_ptr": grad,
        "hidden_ptr": hidden,
        "activated_ptr": activated,
        "column_sums_ptr": sums,
        "row_count": count,
        "width": width,
        "ROWS": GELU_ROWS,
        "COLUMNS": GELU_COLUMNS,
    }
    return Launch(_gelu_backward_kernel, programs, arguments), activated, sums


def gelu_backward(
    grad: Tensor, hidden: Tensor, needs_activated: bool, needs_column_sum: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`torch_steps.gelu_backward` in one pass."""
    launch, activated, sums = gelu_backward_launch(grad, hidden, needs_activated, needs_column_sum)
    launch.run()
    return activated, added(sums)


def added(sums: Tensor | None) -> Tensor | None:
    """Partial sums (programs, width) added up, in an order that depends on their number only."""
    return None if sums is None else sums.sum(0)


TRITON_STEPS = Steps(torch_steps.hidden_layer, add_and_norm, add_and_norm_backward, gelu_backward)


def row_cases(*, has_norm: bool) -> list[CompileCase]:
    """The kernels on whole rows in training, which stores most. One width for each tile: nano's, ViT-B's (and L's), ViT-H's."""
    cases = []
    dtypes = [(torch.float32, torch.bfloat16), *((dtype, dtype) for dtype in KERNEL_DTYPES)]
    for width, (stream, dtype) in itertools.product((128, 768, 1280), dtypes):
        name = f"{width} channels, {short(dtype)} in {short(stream)}"
        residual, tokens = (
            torch.empty(4096, width, dtype=each, device="meta") for each in (stream, dtype)
        )
        weight = torch.empty(width, dtype=stream, device="meta") if has_norm else None
        terms = Sum(residual, tokens, tokens, 0.5, weight, weight, 1e-6, True)
        launch, (x, _, mean, rstd) = add_and_norm_launch(terms)
        cases.append(launch.compile_case(f"forward, {name}"))
        if weight is not None:
            kept, norm = (x, mean, rstd), (weight, weight)
            inputs = SumBackward(residual, tokens, *kept, *norm, dtype, True, (True, True))
            launch, *_ = add_and_norm_backward_launch(inputs)
            cases.append(launch.compile_case(f"backward, {name}"))
    return cases


def gelu_cases() -> list[CompileCase]:
    """The GELU's backward in every dtype; its tile is the same for every width."""
    cases = []
    for dtype in KERNEL_DTYPES:
        hidden = torch.empty(4096, 3072, dtype=dtype, device="meta")
        launch, *_ = gelu_backward_launch(hidden, hidden, True, True)
        cases.append(launch.compile_case(f"GELU, backward, {short(dtype)}"))
    return cases
