"""Provenance of a measurement: hardware, versions, commit, command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from refsam.runtime.provenance import installed

ROOT = Path(__file__).resolve().parents[1]


def collect(device: str) -> dict[str, Any]:
    """Everything that one needs to repeat a measurement on `device`, as JSON takes it."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": run("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(run("git", "status", "--porcelain", "--untracked-files=no")),
        "hardware": hardware(device),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def hardware(device: str) -> dict[str, Any]:
    """The processor and, for "cuda", the GPU."""
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def processor() -> str:
    """The processor's name as the system has it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and the libraries that compute."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return found | {name: installed(name) for name in ("refsam", "torch", "triton", "numpy")}


def write_json(path: Path, origin: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON value: the provenance, and the rows, one a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"provenance": {json.dumps(origin)},\n"rows": [\n{lines}\n]}}\n')


def run(*command: str) -> str | None:
    """The output of a command, or None if it cannot run."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
