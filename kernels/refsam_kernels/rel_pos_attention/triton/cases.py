"""The configurations that `rel_pos_attention` ships in Triton, for the compile gate."""

from collections.abc import Iterator

import torch
from torch import Tensor

from refsam_kernels.core.reasons import short
from refsam_kernels.core.triton_aot import ARCHITECTURES, SPILL_LIMIT, CompileCase, Launch
from refsam_kernels.rel_pos_attention.triton.launches import (
    Operands,
    Problem,
    forward_launch,
    key_tiles,
    launch_of,
    table_gradient_launch,
    table_parts,
)

HEADS = 12
JUDGED = (
    64,
    80,
)  # head dimensions of SAM: they must not spill; spills of the others are only listed
# Window and grid. Tiles for 40 and 48 are those for 80, whose rows need several tiles.
WINDOWS = ((14, 64), (64, 64), (80, 80), (32, 32))
SHIPPED = (
    *((head_dim, torch.bfloat16, window) for head_dim in JUDGED for window in WINDOWS),
    *((head_dim, torch.float32, window) for head_dim in JUDGED for window in WINDOWS[:2]),
    *((head_dim, torch.bfloat16, window) for head_dim in (32, 128) for window in WINDOWS[:2]),
)
# Grids whose sides have no factor in common with a tile: window, height and width.
ODD = ((14, 40, 50), (0, 80, 48))


def compile_cases() -> list[CompileCase]:
    """The kernels for SAM's windows and grids on every architecture; float16 has bfloat16's registers and memory."""
    return [
        launch.compile_case(
            f"{name} {head_dim} {short(dtype)} {of_grid}",
            architectures=(architecture,),
            spill_limit=SPILL_LIMIT if head_dim in JUDGED else None,
        )
        for head_dim, dtype, of_grid, sizes in shipped()
        for architecture in ARCHITECTURES
        for name, launch in launches_of(problem_of(sizes, head_dim, dtype, architecture))
    ]


def shipped() -> Iterator[tuple[int, torch.dtype, str, tuple[int, int, int, int]]]:
    """Head dimension, dtype, and the grid in words and as height, width, window's height and width."""
    for head_dim, dtype, (window, grid) in SHIPPED:
        yield head_dim, dtype, f"{window} of {grid}", (grid, grid, window, window)
    for head_dim in JUDGED:
        for window, h, w in ODD:
            sizes = (h, w, window or h, window or w)
            yield head_dim, torch.bfloat16, f"{window or 'all'} of {h}x{w}", sizes


def problem_of(
    sizes: tuple[int, int, int, int], head_dim: int, dtype: torch.dtype, architecture: int
) -> Problem:
    """One image's grid in windows with SAM's padding; `sizes` as in `shipped`."""
    h, w, window_h, window_w = sizes
    return Problem(1, h, w, HEADS, head_dim, window_h, window_w, "bias", dtype, architecture)


def launches_of(problem: Problem) -> Iterator[tuple[str, Launch]]:
    """Every launch of the forward and the backward by name, on the meta device."""
    grid = (problem.images, problem.h, problem.w)
    width = problem.heads * problem.head_dim

    def tensor(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    qkv, out = tensor(*grid, 3 * width), tensor(*grid, width)
    table_h = tensor(2 * problem.window_h - 1, problem.head_dim)
    table_w = tensor(2 * problem.window_w - 1, problem.head_dim)
    statistic = tensor(problem.images, problem.heads, *grid[1:], dtype=torch.float32)
    operands = Operands(qkv, table_h, table_w, tensor(3 * width))
    yield "forward", forward_launch(problem, operands, out, statistic)
    rel_h, rel_w = operands.scratch(problem)
    tensors = {"grad_out": out, "log_sum_exp": statistic, "grad_qkv": qkv, "delta": statistic}
    tensors |= {"rel_h": rel_h, "rel_w": rel_w}
    of_queries = {"out": out, "d_rel_h": rel_h, "d_rel_w": rel_w}
    yield "query gradient", launch_of("query_gradient", problem, operands, tensors | of_queries)
    padding = tensor(problem.windows * key_tiles(problem), 2, problem.head_dim, dtype=torch.float32)
    of_keys = {"grad_padding": padding if problem.is_padded else None}
    yield "key gradient", launch_of("key_gradient", problem, operands, tensors | of_keys)
    for axis, d_rel in (("h", rel_h), ("w", rel_w)):
        parts = table_parts(problem, qkv, of_rows=axis == "h")
        launch = table_gradient_launch(problem, qkv, d_rel, parts, of_rows=axis == "h")
        yield f"table gradient {axis}", launch
