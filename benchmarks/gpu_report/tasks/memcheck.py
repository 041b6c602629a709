"""Repeats the failures of an earlier report under compute-sanitizer: `REFSAM_REPORT_ROWS` names that report's rows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_report.rows import Rows, read

FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/bin")
LINES = 40  # of the sanitizer's output


def run(rows: Rows, operator: str) -> None:
    """A row for each backend of the operator whose smoke result was wrong."""
    known = read(Path(os.environ.get("REFSAM_REPORT_ROWS", "")))
    failed = {
        row["backend"]
        for row in known
        if row["stage"] == "smoke" and row.get("wrong") and row.get("operator") == operator
    }
    if not failed:
        rows.write(operator=operator, skipped="nothing failed in the rows that were given")
        return
    tool = shutil.which("compute-sanitizer") or next(
        (found for folder in FOLDERS if (found := shutil.which("compute-sanitizer", path=folder))),
        None,
    )
    if tool is None:
        rows.write(operator=operator, skipped="compute-sanitizer was not found")
        return
    for backend in sorted(failed - {"automatic"}):
        command = [tool, "--tool", "memcheck", "--kernel-regex", "kns=refsam", sys.executable]
        command += ["-m", "benchmarks.gpu_report.task", "smoke", operator, backend]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        said = [line for line in result.stdout.splitlines() if line.startswith("=========")]
        rows.write(operator=operator, backend=backend, memcheck=said[:LINES])
