"""Two processes with gloo: the losses of one process with the doubled batch, shared as asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refsam.config import config_from_dict
from refsam.errors import ConfigError, UserError
from refsam.training.loop import Trainer
from refsam.training.settings import TrainingSettings
from tests.data import fixtures
from tests.training.runs import losses_of, run_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    fixtures.write_ref_youtube_vos(folder / "videos")
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """The results of two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "tests.training.two_processes", str(folder)]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def doubled(folder: Path) -> list[float]:
    """Losses of one process whose batches are twice as large."""
    return losses_of(Trainer(run_settings(folder, "doubled", steps=3, clips=2)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one_with_the_doubled_batch(
    result: dict[str, Any], doubled: list[float], parallel: str
) -> None:
    assert result[parallel] == pytest.approx(doubled[:2], rel=1e-5)


def test_each_way_goes_on_from_the_state_of_the_other(
    result: dict[str, Any], doubled: list[float]
) -> None:
    assert result["fsdp from ddp"] == pytest.approx(doubled[2:], rel=1e-4)
    # The second goes on behind what the first has left.
    assert result["ddp from fsdp"] == pytest.approx(doubled[2:], rel=1e-4)


def test_sharded_means_dtensors(result: dict[str, Any]) -> None:
    assert result["fsdp optimiser"] and result["fsdp share"] == 0.5
    assert not result["fsdp wrapped"]
    # Only what a block hands to the one before, and scalars, are left whole.
    assert all("norm1" in n or n == "dense_attention.log_scale" for n in result["fsdp whole"])
    assert "image_encoder.blocks.0.attn.qkv.weight" in result["fsdp sharded"]
    assert "mask_decoder.mask_tokens.weight" in result["fsdp sharded"]


def test_data_parallel_is_pytorchs(result: dict[str, Any]) -> None:
    assert result["ddp wrapped"] and result["ddp share"] == 1.0
    assert not result["ddp sharded"] and not result["ddp optimiser"]


def test_the_first_process_alone_writes(result: dict[str, Any], folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "ddp/log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "total" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert (folder / "ddp/best/model.safetensors").exists()


def test_a_state_of_two_processes_goes_on_in_one(result: dict[str, Any], folder: Path) -> None:
    said: list[str] = []
    settings = run_settings(folder, "ddp", steps=4)
    losses = losses_of(Trainer(settings, said.append))
    assert len(losses) == 1
    assert any("2 processes before, now 1" in text for text in said)


def test_sharded_wants_torchrun_and_no_muon(folder: Path) -> None:
    with pytest.raises(UserError, match="parallel: got fsdp, want processes started by torchrun"):
        Trainer(run_settings(folder, "alone", parallel="fsdp"))
    stages = [{"steps": 1, "clips": 1}]
    values = {"model": {"preset": "nano"}, "output": "x", "stages": stages, "parallel": "fsdp"}
    with pytest.raises(ConfigError, match=r"optimiser\.muon: needs whole matrices"):
        config_from_dict(TrainingSettings, values | {"optimiser": {"muon": True}})
