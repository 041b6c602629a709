"""`python -m benchmarks.gpu_report.rehearsed FOLDER`: whether a rehearsal left what a report must leave."""

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_report.rows import read

FILES = ("rows.jsonl", "report.log", "summary.txt")
MOST_FILES = 6


def main(folder: Path) -> int:
    """Prints what is missing; 1 if something is."""
    faults = [
        *faults_of(folder),
        *planted(folder / "fail", "failed"),
        *planted(folder / "hang", "killed"),
    ]
    print("\n".join(faults) or f"{folder}: the rehearsal left every file and row that it must")
    return int(bool(faults))


def faults_of(folder: Path) -> Iterator[str]:
    """Problems of an undisturbed report: missing files, failed tasks, wrong results."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    yield from (f"{folder}: no {name}" for name in FILES if not (folder / name).is_file())
    if len(files) > MOST_FILES:
        yield f"{folder}: {len(files)} files, at most {MOST_FILES} may be"
    for row in read(folder / "rows.jsonl"):
        if row.get("wrong") and row["task"] != "libraries":  # no CUDA library loads without CUDA
            yield f"{row['stage']}/{row['task']}: {row['wrong']}"
        if row.get("outcome", "done") != "done":
            yield f"{row['stage']}/{row['task']}: {row['outcome']}"


def planted(folder: Path, outcome: str) -> Iterator[str]:
    """Tasks that should have failed or hung and did not, or lost the row that they had written."""
    found = read(folder / "rows.jsonl")
    yield from (f"{folder}: no {name}" for name in FILES if not (folder / name).is_file())
    rows = {(row["stage"], row["task"]) for row in found if "outcome" not in row}
    for row in found:
        name = row["stage"], row["task"]
        if "outcome" in row and not (row["outcome"].startswith(outcome) and name in rows):
            yield f"{folder}: {'/'.join(name)}: {row['outcome']}, {'a' if name in rows else 'no'} row"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
