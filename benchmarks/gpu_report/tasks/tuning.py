"""Finds the fastest tiles of `rel_pos_attention` on this GPU: forward, query gradient and key gradient, each timed alone.

A candidate's results are compared with the default tile's, which the smoke stage compares with float64, before it is timed.
The best ones go to tuned.json, under the GPU's name and under its architecture; it belongs to
kernels/refsam_kernels/rel_pos_attention/triton/tuned.json.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report.machine import (
    DEVICE,
    IS_REHEARSAL,
    attempt,
    captured,
    median_ms,
)
from benchmarks.gpu_report.rows import Rows
from refsam_kernels.core.triton_aot import Launch, precompile
from refsam_kernels.rel_pos_attention.triton import launches
from refsam_kernels.rel_pos_attention.triton.cases import launches_of
from refsam_kernels.rel_pos_attention.triton.launches import (
    KERNELS,
    Operands,
    Problem,
    Tile,
    columns_for,
)

# Heads, channels of a head, window: a block of ViT-B or L, and of ViT-H.
SETTINGS = {"64-14": (12, 64, 14), "64-0": (12, 64, 0), "80-14": (16, 80, 14), "80-0": (16, 80, 0)}
TOLERANCE = 2e-2  # of the norm, between two tiles in bfloat16
GRID = 3 if IS_REHEARSAL else 64
SECONDS = 0.15  # for each candidate


def run(rows: Rows, name: str) -> None:
    """A row for each kernel and tile; the best tiles are written when a kernel is done."""
    problem = problem_of(name, *launches.gpu_of(torch.device(DEVICE)))
    inputs = Inputs(problem)
    for kernel, candidates in tiles_of(problem).items():
        inputs.use(kernel, None)
        wanted = inputs.results(kernel)
        times: dict[Tile, float] = {}
        for tile in candidates[1:2] if IS_REHEARSAL else candidates:
            measure = partial(time_tile, inputs, kernel, tile, wanted, times)
            attempt(rows, measure, setting=name, kernel=kernel, tile=asdict(tile))
        best = min(times, key=lambda tile: times[tile], default=None)
        inputs.use(kernel, best)
        if best is not None:
            rows.write(setting=name, kernel=kernel, best=asdict(best), median_ms=times[best])
            keep(problem, kernel, best)


def problem_of(name: str, architecture: int, device_name: str = "") -> Problem:
    """Four images' attention in bfloat16; in a rehearsal one small image in float32, as Triton's interpreter wants it."""
    heads, head_dim, window = (1, 16, min(2, SETTINGS[name][2])) if IS_REHEARSAL else SETTINGS[name]
    images, dtype = (1, torch.float32) if IS_REHEARSAL else (4, torch.bfloat16)
    side = window or GRID
    sizes = (images, GRID, GRID, heads, head_dim, side, side)
    return Problem(*sizes, "bias", dtype, architecture, device_name)


def tiles_of(problem: Problem) -> dict[str, list[Tile]]:
    """The tiles that are tried, the one in use first."""
    return {kernel: list(dict.fromkeys(candidates(kernel, problem))) for kernel in KERNELS}


def candidates(kernel: str, problem: Problem) -> Iterator[Tile]:
    """The tile in use, then others that fit the problem."""
    yield problem.tile(kernel)
    for block, num_warps in ((64, 4), (128, 8), (64, 8), (128, 4)):
        for keys in (64, 32, 128):
            columns = columns_for(problem.window_w, min(keys, 64))
            for num_stages in (2, 3):
                yield Tile(block, max(1, keys // columns), columns, num_warps, num_stages)


def compile_tile(name: str, kernel: str, number: int, architecture: int) -> None:
    """Compiles one candidate into Triton's cache."""
    problem = problem_of(name, architecture)
    use(problem, kernel, tiles_of(problem)[kernel][number])
    wanted = kernel.replace("_", " ")
    launch = next(launch for found, launch in launches_of(problem) if found == wanted)
    precompile(launch.compile_case(kernel), architecture)


def use(problem: Problem, kernel: str, tile: Tile | None) -> None:
    """Lets the kernel run with the tile on this problem from now on, in this process; None: the default."""
    entries = launches.tuned().setdefault(problem.tuned_keys[0], {})
    entries.pop(problem.tuned_name(kernel), None)
    if tile is not None:
        entries[problem.tuned_name(kernel)] = asdict(tile)


class Inputs:
    """The tensors of one problem, and its three kernels on them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        draw = partial(torch.randn, device=DEVICE, dtype=problem.dtype)
        grid, width = (problem.images, problem.h, problem.w), problem.heads * problem.head_dim
        table_h, table_w = (
            0.3 * draw(2 * side - 1, problem.head_dim)
            for side in (problem.window_h, problem.window_w)
        )
        self.operands = Operands(draw(*grid, 3 * width), table_h, table_w, draw(3 * width))
        self.out = draw(*grid, width)
        self.log_sum_exp = torch.empty(problem.images, problem.heads, *grid[1:], device=DEVICE)
        self.forward().run()
        rel_h, rel_w = self.operands.scratch(problem)
        self.tensors: dict[str, Tensor | None] = {
            "grad_out": draw(*grid, width),
            "log_sum_exp": self.log_sum_exp,
            "grad_qkv": torch.empty_like(self.operands.qkv),
            "delta": torch.empty_like(self.log_sum_exp),
            "rel_h": rel_h,
            "rel_w": rel_w,
        }
        d_rel = self.operands.scratch(problem, zero=True)
        self.of_queries = {"out": self.out, "d_rel_h": d_rel[0], "d_rel_w": d_rel[1]}
        self.query_gradient().run()

    def use(self, kernel: str, tile: Tile | None) -> None:
        """Lets the kernel run with the tile from now on; None: the default."""
        use(self.problem, kernel, tile)

    def forward(self) -> Launch:
        """The forward's launch."""
        return launches.forward_launch(self.problem, self.operands, self.out, self.log_sum_exp)

    def query_gradient(self) -> Launch:
        """The queries' gradient's launch."""
        tensors = {**self.tensors, **self.of_queries}
        return launches.launch_of("query_gradient", self.problem, self.operands, tensors)

    def key_gradient(self) -> Launch:
        """The keys' gradient's launch, with room for what padding tokens get."""
        problem, room = self.problem, None
        if problem.is_padded:
            count = problem.windows * launches.key_tiles(problem)
            room = torch.empty(count, 2, problem.head_dim, device=DEVICE)
        tensors = {**self.tensors, "grad_padding": room}
        return launches.launch_of("key_gradient", problem, self.operands, tensors)

    def results(self, kernel: str) -> Tensor:
        """The kernel's results, run once."""
        written = self.out if kernel == "forward" else self.tensors["grad_qkv"]
        assert written is not None
        written.fill_(float("nan"))
        getattr(self, kernel)().run()
        third = self.out.shape[-1]
        parts = {"query_gradient": slice(0, third), "key_gradient": slice(third, None)}
        return written[..., parts.get(kernel, slice(None))].clone()


def time_tile(
    inputs: Inputs, kernel: str, tile: Tile, wanted: Tensor, times: dict[Tile, float]
) -> dict[str, Any]:
    """The kernel's time with a tile, if its results are those of the default one."""
    inputs.use(kernel, tile)
    found = inputs.results(kernel)
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not error <= TOLERANCE:
        return {"wrong": f"differs from the default tile's results by {error:.1e}"}
    call: Callable[[], None] = getattr(inputs, kernel)().run
    measured = median_ms(captured(call), SECONDS)
    times[tile] = measured["median_ms"]
    return measured | {"difference": error}


def keep(problem: Problem, kernel: str, tile: Tile) -> None:
    """Adds a tile to the report's tuned.json."""
    path = Path(os.environ["REFSAM_REPORT_OUT"]) / "tuned.json"
    known = json.loads((path if path.is_file() else launches.TUNED).read_text())
    for key in problem.tuned_keys:
        known.setdefault(key, {})[problem.tuned_name(kernel)] = asdict(tile)
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
