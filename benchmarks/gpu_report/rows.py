"""Rows of the report: one JSON object a line, appended and flushed as soon as it exists, by several processes to one file."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Rows:
    """Appends rows of one task to a file."""

    def __init__(self, path: Path, stage: str, task: str) -> None:
        self.path, self.stage, self.task = path, stage, task

    def write(self, **facts: Any) -> None:
        """Appends a row; it is one write of one line, so that processes do not mix theirs."""
        row = {"stage": self.stage, "task": self.task, "at": round(time.time(), 1), **facts}
        line = (json.dumps(row, default=str) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
