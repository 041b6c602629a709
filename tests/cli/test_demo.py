"""``refsam demo``: masks, overlay and J&F of a generated clip."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refsam.cli import main
from refsam.data.photographs.sample import EXPRESSIONS
from tests.tiny_model import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


def test_prints_scores_and_writes_results(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--frames", "3", "--checkpoint", str(checkpoint)]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    scores = [float(score) for score in re.findall(r"J&F (\d\.\d{3})", result.stdout)]
    report = json.loads((out / "result.json").read_text())
    assert len(scores) == len(report["expressions"]) + 1
    assert scores[-1] == pytest.approx(sum(scores[:-1]) / (len(scores) - 1), abs=1e-3)
    assert (out / "overlay.mp4").stat().st_size > 0
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_photographs_are_segmented_without_a_score(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="needs refsam[train]")
    out = tmp_path / "demo"
    arguments = ["demo", "--photo", "--out", str(out), "--frames", "2", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--checkpoint", str(checkpoint)])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "result.json").read_text())
    assert [row["text"] for row in report["expressions"]] == list(EXPRESSIONS)
    assert "J&F" not in result.stdout and len(list((out / "masks" / "00").iterdir())) == 2
