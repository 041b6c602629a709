"""Tuning in the GPU report: what is wrong is never timed, what is found is used on GPUs like this one and written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_report.tasks import tuning
from refsam_kernels.rel_pos_attention.triton import launches
from refsam_kernels.rel_pos_attention.triton.launches import Problem, Tile

FAST, SLOW, WRONG = (Tile(block, 1, 16, 4, 2) for block in (16, 32, 64))
H200 = "NVIDIA H200"


def problem_on(device_name: str, architecture: int = 90) -> Problem:
    """SAM's global attention."""
    sizes = (1, 64, 64, 12, 64, 64, 64)
    return Problem(*sizes, "bias", torch.bfloat16, architecture, device_name)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The table of tuned tiles, empty."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(launches, "tuned", lambda: found)
    return found


def test_a_tuned_tile_is_used_for_its_kernel_and_sizes_only(table: dict[str, Any]) -> None:
    problem = problem_on(H200)
    default = problem.tile("forward")
    tuning.use(problem, "forward", FAST)
    assert problem.tile("forward") == FAST
    assert problem.tile("key_gradient") == launches.default_tile("key_gradient", problem)
    tuning.use(problem, "forward", None)
    assert problem.tile("forward") == default


def test_tiles_are_the_gpus_own_or_else_its_architectures(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFSAM_REPORT_OUT", str(tmp_path))
    tuning.keep(problem_on(H200), "forward", FAST)
    tuning.keep(problem_on(H200), "key_gradient", SLOW)
    table |= json.loads((tmp_path / "tuned.json").read_text())
    assert sorted(table) == [H200, "sm_90"]
    assert problem_on(H200).tile("forward") == FAST
    assert problem_on("NVIDIA H100 PCIe").tile("key_gradient") == SLOW
    another = problem_on("NVIDIA B200", 100)
    assert another.tile("forward") == launches.default_tile("forward", another)
    table["sm_90"] = {}
    assert problem_on(H200).tile("forward") == FAST
    assert problem_on("NVIDIA H100 PCIe").tile("forward") != FAST


def test_a_call_asks_for_the_tiles_of_its_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.empty(1, 4, 4, 96, dtype=torch.bfloat16)
    assert Problem.of(qkv, 2, 0, "bias").tuned_keys == ("sm_80",)
    monkeypatch.setattr(launches, "gpu_of", lambda device: (90, H200))
    assert Problem.of(qkv, 2, 0, "bias").tuned_keys == (H200, "sm_90")


@pytest.mark.parametrize("kernel", launches.KERNELS)
def test_candidates_begin_with_the_one_in_use_and_cover_the_window(
    kernel: str, table: dict[str, Any]
) -> None:
    problem = problem_on(H200)
    assert next(tuning.candidates(kernel, problem)) == launches.default_tile(kernel, problem)
    tuning.use(problem, kernel, FAST)
    first, *others = tuning.candidates(kernel, problem)
    assert first == FAST
    assert {tile.rows * tile.columns for tile in others} == {32, 64, 128}


def test_a_wrong_tile_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "median_ms", lambda call, seconds: {"median_ms": 1.0})
    monkeypatch.setattr(tuning, "captured", lambda call: call)
    inputs: Any = Inputs()
    times: dict[Tile, float] = {}
    wanted = torch.ones(4)
    assert "differs" in tuning.time_tile(inputs, "forward", WRONG, wanted, times)["wrong"]
    assert tuning.time_tile(inputs, "forward", FAST, wanted, times)["median_ms"] == 1.0
    assert times == {FAST: 1.0}


class Inputs:
    """Kernels of which one tile computes something else."""

    def use(self, kernel: str, tile: Tile) -> None:
        self.tile = tile

    def results(self, kernel: str) -> torch.Tensor:
        return torch.full((4,), 2.0 if self.tile == WRONG else 1.0)

    def forward(self) -> Any:
        return self

    def run(self) -> None:
        pass
