"""`python -m benchmarks.tune [--out FILE] [--seconds 240]`: finds the fastest tiles of `rel_pos_attention` on this machine's GPU.

Every candidate's output and gradients are checked before it is timed, so a wrong one cannot win. The table belongs into
kernels/refsam_kernels/rel_pos_attention/triton/tuned.json: `--out` that file, or copy it there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import time_cuda
from benchmarks.ops.rel_pos_attention import Setting, workload
from refsam_kernels.rel_pos_attention.triton.launches import (
    KERNELS,
    TUNED,
    Problem,
    Tile,
    columns_for,
    tuned,
)

REPEATS = 10
SETTINGS = tuple(
    Setting(f"{head_dim}-channel heads, window {window}", heads, head_dim, window, trains=True)
    for window in (0, 14)
    for heads, head_dim in ((12, 64), (16, 80))
)


def main(arguments: list[str] | None = None) -> int:
    """Tunes, prints what was found and writes the table with --out; returns 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=main.__doc__)
    parser.add_argument("--out", type=Path, help="JSON file; other architectures' entries stay")
    parser.add_argument("--seconds", type=float, default=240.0, help="no candidate starts later")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning needs a CUDA device; there is none here")
        return 2
    deadline = time.monotonic() + options.seconds
    for setting in SETTINGS:
        tune_setting(setting, deadline)
    if options.out:
        known = json.loads(TUNED.read_text()) | tuned()
        options.out.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    return 0


def tune_setting(setting: Setting, deadline: float) -> None:
    """Tunes the kernels of one block in turn, each with the best tiles of those before it."""
    case = workload("cuda", setting=setting, with_peers=False)
    run = case.providers["triton"]
    qkv = setting.inputs("cuda")["qkv"]
    problem = Problem.of(qkv, setting.heads, setting.window, "bias")
    for kernel in KERNELS:
        tiles = candidates(kernel, problem)
        best = fastest(tiles, partial(use, problem, kernel), run, case.wrong, time_cuda, deadline)
        use(problem, kernel, best)
        print(f"{setting.name}, {kernel}: {best or 'the default'}", flush=True)


def candidates(kernel: str, problem: Problem) -> Iterator[Tile]:
    """The default tile, then others that fit the problem."""
    yield problem.tile(kernel)
    for block, num_warps in ((64, 4), (128, 8), (32, 4), (64, 8)):
        for keys in (64, 32, 128):
            columns = columns_for(problem.window_w, min(keys, 64))
            for num_stages in (2, 3):
                yield Tile(block, keys // columns, columns, num_warps, num_stages)


def use(problem: Problem, kernel: str, tile: Tile | None) -> None:
    """Lets the kernel run with the tile on this problem from now on, in this process; None: the default."""
    entries = tuned().setdefault(f"sm_{problem.architecture}", {})
    entries.pop(problem.tuned_name(kernel), None)
    if tile is not None:
        entries[problem.tuned_name(kernel)] = asdict(tile)


def fastest(
    tiles: Iterator[Tile],
    choose: Callable[[Tile], None],
    run: Callable[[], Any],
    wrong: Callable[[Sequence[Tensor]], str | None],
    timer: Callable[[Callable[[], Any]], float],
    deadline: float,
) -> Tile | None:
    """The tile with the least median time among those whose results are right; None if there is none."""
    times = {}
    for tile in dict.fromkeys(tiles):
        if time.monotonic() > deadline:
            break
        choose(tile)
        try:
            fault = wrong(run())
        except (RuntimeError, ValueError) as error:  # does not compile, or needs more than there is
            fault = str(error).partition("\n")[0]
        if fault:
            print(f"{tile}: left out, {fault}")
            continue
        times[tile] = sorted(timer(run) for _ in range(REPEATS))[REPEATS // 2]
    return min(times, key=lambda tile: times[tile], default=None)


if __name__ == "__main__":
    sys.exit(main())
