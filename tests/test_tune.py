"""The tuner: what is wrong is never timed, what is found is used and written."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from refsam_kernels.rel_pos_attention.triton import launches
from refsam_kernels.rel_pos_attention.triton.launches import Problem, Tile

FAST, SLOW, WRONG, BROKEN = (Tile(block, 1, 16, 4, 2) for block in (16, 32, 64, 128))
SECONDS = {FAST: 1.0, SLOW: 2.0}
FOREVER = float("inf")


class Machine:
    """Runs tiles: one is wrong, one does not compile; says how long the others take."""

    def __init__(self) -> None:
        self.tile: Tile | None = None
        self.timed: list[Tile] = []

    def choose(self, tile: Tile) -> None:
        self.tile = tile

    def run(self) -> Tile | None:
        if self.tile == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        return self.tile

    def wrong(self, result: Any) -> str | None:
        return "off by 1" if result == WRONG else None

    def time(self, run: Any) -> float:
        self.timed.append(run())
        return SECONDS[self.timed[-1]]


def find(machine: Machine, *tiles: Tile, deadline: float = FOREVER) -> Tile | None:
    callbacks = (machine.choose, machine.run, machine.wrong, machine.time)
    return tune.fastest(iter(tiles), *callbacks, deadline)


def test_only_right_candidates_are_timed() -> None:
    machine = Machine()
    assert find(machine, WRONG, SLOW, BROKEN, FAST) == FAST
    assert set(machine.timed) == {SLOW, FAST}
    assert find(machine, WRONG, BROKEN) is None


def test_no_candidate_starts_after_the_deadline() -> None:
    machine = Machine()
    assert find(machine, FAST, deadline=0.0) is None
    assert machine.timed == []


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Problem:
    """SAM's global attention; the table of tuned tiles is empty."""
    table: dict[str, Any] = {}
    monkeypatch.setattr(launches, "tuned", lambda: table)
    monkeypatch.setattr(tune, "tuned", lambda: table)
    sizes = (1, 64, 64, 12, 64, 64, 64)
    return Problem(*sizes, pad_mode="bias", dtype=torch.bfloat16, architecture=90)


def test_tuned_tile_is_used_for_its_kernel_and_sizes_only(problem: Problem) -> None:
    default = problem.tile("forward")
    tune.use(problem, "forward", FAST)
    assert problem.tile("forward") == FAST
    assert problem.tile("key_gradient") == launches.default_tile("key_gradient", problem)
    tune.use(problem, "forward", None)
    assert problem.tile("forward") == default


@pytest.mark.parametrize("kernel", launches.KERNELS)
def test_candidates_begin_with_the_default_and_cover_the_window(
    kernel: str, problem: Problem
) -> None:
    tiles = list(tune.candidates(kernel, problem))
    assert tiles[0] == launches.default_tile(kernel, problem)
    assert {tile.rows * tile.columns for tile in tiles} == {32, 64, 128}


def test_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
