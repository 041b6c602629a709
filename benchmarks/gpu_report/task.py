"""`python -m benchmarks.gpu_report.task FUNCTION ARGUMENT...`: one task, a function of `benchmarks.gpu_report.tasks`."""

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.rows import Rows


class PlantedRows(Rows):
    """Rows that fail after the first one, as a rehearsal asks for."""

    def write(self, **facts: Any) -> None:
        """Writes the row; the task does not survive it."""
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


def main(arguments: list[str]) -> None:
    """Runs the function with rows to write to."""
    name, *rest = arguments
    task, stage = os.environ["REFSAM_REPORT_TASK"], os.environ["REFSAM_REPORT_STAGE"]
    kind = PlantedRows if os.environ.get("REFSAM_REPORT_PLANT") else Rows
    rows = kind(Path(os.environ["REFSAM_REPORT_OUT"]) / "rows.jsonl", stage, task)
    import_module(f"benchmarks.gpu_report.tasks.{name}").run(rows, *rest)


if __name__ == "__main__":
    main(sys.argv[1:])
