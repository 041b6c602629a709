"""Runs a test file in a process of its own, with an environment that is read when modules are imported."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_tests(path: Path, environment: Mapping[str, str], *options: str) -> None:
    """Runs the file's tests with one thread; fails with their report. `options` are pytest's."""
    quiet = {"OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *options, str(path)],
        cwd=ROOT,
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    allowed = (0, pytest.ExitCode.NO_TESTS_COLLECTED) if options else (0,)
    assert result.returncode in allowed, result.stdout[-8000:] + result.stderr[-2000:]
