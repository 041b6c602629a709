"""The three paths of docs/checkpoint.md, command by command as written there, with settings added that make them small."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from refsam import RefSAM, RefSAMConfig, checkpoint
from refsam.cli import main
from tests.data import fixtures
from tests.data.test_splitting import write_videos
from tests.test_checkpoint import SAM_SIZES

ROOT = Path(__file__).parents[1]


def commands(heading: str) -> list[list[str]]:
    """The `refsam` commands of a section's code blocks, in order."""
    text = (ROOT / "docs/checkpoint.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}.*?(?=^## |\Z)", text, re.M | re.S)
    assert section is not None
    blocks = re.findall(r"^```\n(.*?)^```", section[0], re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("refsam ")]


def run(command: list[str], added: dict[str, list[str]]) -> str:
    """Run one, with what is added to commands that begin so."""
    line = " ".join(command)
    extra = [word for start, words in added.items() if line.startswith(start) for word in words]
    result = CliRunner().invoke(main, [*command, *extra])
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the project's configurations in it, as in a fresh clone."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_minutes(place: Path) -> None:
    (command,) = commands("Minutes")
    assert "model written to run/model" in run(command, {})


def test_hours(place: Path) -> None:
    write_videos(place / "mine", 3)
    frames = sorted((place / "mine/train/frames/clip0").iterdir())
    (place / "clip.mp4").mkdir()  # a folder of frames does as a video
    for frame in frames:
        (place / "clip.mp4" / frame.name).write_bytes(frame.read_bytes())
    stages = "stages=[{epochs: 1, steps: 2, clips: 1, frames: 2, expressions: 1}]"
    added = {
        "train": [stages, "validation.every=2", "workers=0", "log_every=1"],
        "evaluate": ["--missing", "zero", "--processes", "1"],
        "segment": ["--no-overlay"],
    }
    for command in commands("Hours"):
        run(command, added)
    assert {path.name for path in (place / "run").iterdir()} >= {
        "best",
        "model",
        "curve.png",
        "examples",
    }
    best = checkpoint.read_checkpoint(place / "run/best")
    assert best.kind == "full" and "zeppelin" in (best.tokenizer or "")
    assert (place / "scores/report.html").is_file() and (place / "out/result.json").is_file()


def test_days(place: Path) -> None:
    torch.manual_seed(3)
    state = RefSAM(RefSAMConfig.from_dict(SAM_SIZES)).state_dict()
    torch.save(
        {k: v for k, v in state.items() if checkpoint.is_sam(k)}, place / "sam_vit_b_01ec64.pth"
    )
    (place / "data").mkdir()
    (place / "data/refcoco").mkdir()
    fixtures.write_refcoco(place / "data/refcoco")
    fixtures.write_ref_youtube_vos(place / "data/ref-youtube-vos")
    fixtures.write_davis17(place)
    augmentation = "data.augmentation={short_sides: [48], long_side: 64, crop: 0.0}"
    small = [
        "model={}",
        "device=cpu",
        "dtype=float32",
        "workers=0",
        "peak_tflops=null",
        augmentation,
    ]
    steps = "stages=[{steps: 2, clips: 1, frames: %d, expressions: 1}]"
    added = {
        "convert": ["--text-encoder", "small"],
        "data encode-text configs/refcoco": [*small, steps % 1, "validation.clips=1"],
        "data encode-text configs/ref_youtube": [*small, steps % 2],
        "train configs/refcoco": [*small, steps % 1, "validation.clips=1"],
        "train configs/ref_youtube": [*small, steps % 2],
        "evaluate": ["--missing", "zero", "--processes", "1"],
    }
    every = commands("Days")
    kinds = [" ".join(command[:2]) for command in every]
    assert "data prepare-davis17" in kinds and kinds.count("data encode-text") == 2
    for command in every:
        run(command, added)
    stored = checkpoint.read_checkpoint(place / "runs/ref_youtube_vos_vit_b/model")
    assert stored.kind == "delta"
    assert np.isfinite([float(t.abs().max()) for t in stored.tensors.values() if t.numel()]).all()
    assert (place / "scores/scores.json").is_file()
