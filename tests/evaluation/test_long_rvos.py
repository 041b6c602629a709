"""Long-RVOS: masks that are left out are empty, and tIoU and vIoU as the authors' evaluation defines them."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from refsam.cli import main
from refsam.data import open_dataset
from refsam.evaluation.runners.long_rvos import _of_expression
from tests.data import fixtures
from tests.data.fixtures import numbers_at


def test_an_object_without_a_file_is_not_seen(tmp_path: Path) -> None:
    dataset = open_dataset("long-rvos", fixtures.write_long_rvos(tmp_path), "valid")
    red, blue = dataset.expressions("v001")
    for time, frame in enumerate(next(v.frame_names for v in dataset.videos if v.name == "v001")):
        assert np.array_equal(dataset.mask(red, frame), numbers_at(time, 2) == 1)
        assert np.array_equal(dataset.mask(blue, frame), numbers_at(time, 2) == 2)
    assert not (tmp_path / "valid/Annotations/v001/2/00001.png").exists()
    assert open_dataset("long-rvos", tmp_path, "test").mask_source is None


@pytest.mark.parametrize("seed", range(6))
def test_times_and_volumes_against_their_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    marked, shown = random.random((2, 9)) < random.choice([0.0, 0.5, 1.0], (2, 1))
    region = np.where(marked & shown, random.random(9), np.where(marked | shown, 0.0, 1.0))
    rows = [
        {"J": j, "F": j, "marked": bool(m), "shown": bool(s)}
        for j, m, s in zip(region, marked, shown, strict=True)
    ]
    scores = _of_expression(rows)
    either = [t for t in range(9) if marked[t] or shown[t]]
    both = [t for t in range(9) if marked[t] and shown[t]]
    assert scores["tIoU"] == pytest.approx(len(both) / len(either) if either else 1.0)
    volume = sum(region[t] for t in both) / len(either) if either else 1.0
    assert scores["vIoU"] == pytest.approx(volume) and scores["J"] == pytest.approx(region.mean())


def test_the_command_scores_all_and_each_type(tmp_path: Path) -> None:
    root = fixtures.write_long_rvos(tmp_path / "data")
    arguments = ["evaluate", "long-rvos", "--root", str(root), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "out/scores.json").read_text())["scores"]
    assert set(scores) == {"all", "static", "dynamic"}
    mean = (scores["static"]["J"] + scores["dynamic"]["J"]) / 2
    assert scores["all"]["J"] == pytest.approx(mean) and 0 <= scores["all"]["tIoU"] <= 1
