"""`python -m benchmarks.gpu_report.task FUNCTION ARGUMENT...`: one task, a function of `benchmarks.gpu_report.tasks`."""

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.rows import Rows


class PlantedRows(Rows):
    """Rows whose first one is the task's last act: a rehearsal plants a failure behind it."""

    def write(self, **facts: Any) -> None:
        """Writes the row, then fails, hangs or crashes."""
        super().write(**facts)
        plant(os.environ["REFSAM_REPORT_PLANT"])


def plant(kind: str) -> None:
    """Fails, hangs or crashes the process."""
    if kind == "fail":
        raise RuntimeError("planted failure")
    if kind == "crash":
        os.abort()
    while kind == "hang":
        time.sleep(1)


def rows_here() -> Rows:
    """The rows of this process's task."""
    out, stage, task = (os.environ[f"REFSAM_REPORT_{name}"] for name in ("OUT", "STAGE", "TASK"))
    kind = PlantedRows if os.environ.get("REFSAM_REPORT_PLANT") else Rows
    return kind(Path(out) / "rows.jsonl", stage, task)


def main(name: str, *arguments: str) -> None:
    """Runs the function with rows to write to."""
    import_module(f"benchmarks.gpu_report.tasks.{name}").run(rows_here(), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
