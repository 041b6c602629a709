"""A run that is killed and started again, through the command line: its losses are those of one that was not, bit by bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from refsam.training.loop import Trainer
from refsam.training.settings import TrainingSettings
from tests.data import fixtures
from tests.tiny_model import CONFIG

ROOT = Path(__file__).parents[2]
STEPS = 20


def write_configuration(folder: Path, name: str) -> Path:
    """A run on a small dataset, with everything that a resumed run must repeat."""
    content = {
        "model": json.loads(json.dumps(CONFIG)),
        "output": str(folder / name),
        "data": {
            "datasets": [{"name": "ref-youtube-vos", "root": str(folder / "videos")}],
            "augmentation": {"short_sides": [40, 56], "long_side": 80, "crop": 0.0},
        },
        "stages": [
            {"steps": STEPS // 2, "clips": 2, "expressions": 2},
            {"steps": STEPS // 2, "clips": 1, "frames": 2, "expressions": 1},
        ],
        "loss": {"focal": 1.0, "dice": 1.0, "iou": 0.5},
        "threads": 1,
        "workers": 0,
        "save_every": 4,
        "log_every": 1,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(configuration: Path, *overrides: str, waits_at: int = 0) -> subprocess.Popen[str]:
    """Starts the run, which waits after a step, if one is given, until its input ends."""
    program = ["tests.training.waiting", str(waits_at)] if waits_at else ["refsam"]
    command = [sys.executable, "-m", *program, "train", str(configuration), *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run_until(process: subprocess.Popen[str], step: int, number: int) -> str:
    """Send the process, and those that serve it, the signal once it waits at the step; what it says after that."""
    assert process.stdout is not None and process.stdin is not None
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            os.killpg(process.pid, number)
            process.stdin.close()
            break
    rest = process.stdout.read()
    process.wait(timeout=300)
    return rest


def curve(folder: Path) -> list[dict[str, float]]:
    """The log's entries of each step, without those that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("step", "total", "focal", "dice", "iou", "gradient_norm", "learning_rate")
    return [{name: line[name] for name in names} for line in lines if "total" in line]


@pytest.fixture
def one_thread() -> None:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_killed_twice_and_resumed_the_curve_is_the_same(tmp_path: Path) -> None:
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    whole = write_configuration(tmp_path, "whole")
    for _ in Trainer(TrainingSettings.from_yaml(whole)).run():
        pass
    assert len(curve(tmp_path / "whole")) == STEPS

    cut = write_configuration(tmp_path, "cut")
    killed = start(cut, "workers=1", waits_at=5)  # which draws batches ahead, and is killed too
    run_until(killed, 5, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    reached = curve(tmp_path / "cut")[-1]["step"]
    assert reached == 5 and not (tmp_path / "cut/model").exists()

    ended = start(cut, waits_at=12)
    said = run_until(ended, 12, signal.SIGTERM)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in said and "the same command continues from it" in said
    stopped_at = curve(tmp_path / "cut")[-1]["step"]
    assert 12 <= stopped_at <= 13
    assert f"after step {stopped_at} of {STEPS}" in said

    resumed = start(cut)
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    steps = [line for line in output.splitlines() if line.startswith("step ")]
    assert steps[0].startswith(f"step {stopped_at + 1}/"), "a signal loses no step"
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    models = [
        (tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "cut")
    ]
    assert models[0] == models[1]
    assert (tmp_path / "cut/curve.png").stat().st_size > 5000
