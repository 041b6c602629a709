"""`refsam bench`: what it starts, and what it refuses before it starts anything."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from refsam.cli import bench, main


def started(*words: str) -> tuple[list[str], Any]:
    """The command that `refsam bench` starts, and the result."""
    finished = subprocess.CompletedProcess([], 3)
    with mock.patch.object(subprocess, "run", return_value=finished) as run:
        result = CliRunner().invoke(main, ["bench", *words])
    assert run.call_args.kwargs["cwd"] == bench.ROOT
    return run.call_args.args[0], result


def test_the_short_set_runs_in_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command, result = started("mask_loss", "--device", "cpu", "--out", "rows", "--seconds", "2")
    assert command[:4] == [sys.executable, "-m", "benchmarks", "mask_loss"]
    assert "--short" in command and command[command.index("--device") + 1] == "cpu"
    assert command[command.index("--out") + 1] == str(tmp_path / "rows")
    assert result.exit_code == 3  # that of what was started


def test_the_full_set_on_any_device() -> None:
    command, _ = started("--full")
    assert not {"--short", "--device"} & set(command)


def test_comparison_takes_places_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, _ = started("--compare", "a", "b", "--threshold", "5")
    assert command[3:] == ["--compare", *(str(tmp_path / n) for n in "ab"), "--threshold", "5.0"]


def test_without_a_checkout_it_says_what_to_do(tmp_path: Path) -> None:
    with mock.patch.object(bench, "ROOT", tmp_path):
        result = CliRunner().invoke(main, ["bench"])
    assert result.exit_code == 2
    assert "clone the repository" in result.stderr and len(result.stderr.splitlines()) == 1


def test_unknown_devices_are_refused() -> None:
    result = CliRunner().invoke(main, ["bench", "--device", "tpu"])
    assert (result.exit_code, result.stderr) == (
        2,
        "refsam: --device tpu: want auto, cpu or cuda\n",
    )
