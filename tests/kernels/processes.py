"""Runs a test file in a process of its own, with an environment that is read when modules are imported."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def processes_of(operators: Sequence[str]) -> list[tuple[str, ...]]:
    """The operators whose tests share a process, which takes seconds to start; the longest are alone in theirs."""
    alone = ("rel_pos_attention", "token_image_attention")
    together = tuple(name for name in operators if name not in alone)
    return [*((name,) for name in operators if name in alone), together]


def run_tests(
    folder: Path, operators: Sequence[str], environment: Mapping[str, str], *options: str
) -> None:
    """Runs the tests of operators with one thread; fails with their report. `options` are pytest's."""
    paths = [folder / f"test_{operator}.py" for operator in operators]
    assert all(path.is_file() for path in paths)
    quiet = {"OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *options, *map(str, paths)],
        cwd=ROOT,
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    allowed = (0, pytest.ExitCode.NO_TESTS_COLLECTED) if options else (0,)
    assert result.returncode in allowed, result.stdout[-8000:] + result.stderr[-2000:]
