"""The benchmark of a training step at a tiny size: all providers agree, and a wrong one gets no time."""

from typing import Any
from unittest import mock

import pytest

from benchmarks.end_to_end import training
from benchmarks.report import tables

NO_MEMORY = {"step_memory_bytes": 2**20, "process_memory_bytes": 2**21}


def rows_of() -> dict[str, dict[str, Any]]:
    options = training.parse(["--image-size=32", "--depth=4", "--frames=2", "--repeats=1"])
    thin = {"embed_dim": 32, "num_heads": 2, "window_size": 3}
    settings = training.training_settings(options)
    model = settings.model | {"image_encoder": settings.model["image_encoder"] | thin}
    small = training.config_from_dict(
        training.TrainingSettings,
        {"model": model, "output": "", "stages": settings.stages, "loss": {"focal": 1, "dice": 1}},
    )
    with (
        mock.patch.object(training, "training_settings", return_value=small),
        mock.patch.object(training, "FRAME", (36, 64)),
    ):
        rows = training.measure(options, lambda name: NO_MEMORY)
    return {row["name"]: row for row in rows}


def test_all_providers_agree() -> None:
    rows = rows_of()
    assert list(rows) == list(training.PROVIDERS)
    assert all("wrong" not in row and row["speedup"] > 0 for row in rows.values())
    lines = [tables._training_line(row, rows[training.BASELINE]) for row in rows.values()]
    assert all(len(line) == 7 and "100 % and 100 %" in line for line in lines)


@pytest.mark.parametrize("tolerance", ["LOSS_TOLERANCE", "GRADIENT_TOLERANCE"])
def test_a_wrong_result_gets_no_time(tolerance: str) -> None:
    with mock.patch.object(training, tolerance, -1.0):
        rows = rows_of()
    assert "off by" in rows[training.OURS]["wrong"]
    assert "median_ms" not in rows[training.OURS]
    assert len(tables._training_line(rows[training.OURS], {})) == 7
    assert "wrong" in training.table_line(rows[training.OURS])
