"""`python -m benchmarks.gpu_report.rehearsed FOLDER [--short] [--out FILE]`: checks that a rehearsal left all files and rows."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import provenance
from benchmarks.gpu_report.rows import read
from benchmarks.gpu_report.runner import result_of
from benchmarks.gpu_report.stages import FIRST, STAGES
from benchmarks.gpu_report.stand_in import shortened

FILES = ("rows.jsonl", "report.log", "summary.txt")
MOST_FILES = 6
# How the outcome of a task begins by what was planted into it.
PLANTED = {"fail": "failed", "hang": "killed"}


def main(arguments: list[str] | None = None) -> int:
    """Prints what is missing and returns 1 if something is. --out writes the counts of each stage and run in any case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report.rehearsed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true", help="it was a short one")
    parser.add_argument("--out", type=Path, help="JSON file for what ran")
    options = parser.parse_args(arguments)
    folders = {None: options.folder} | {plant: options.folder / plant for plant in PLANTED}
    faults: list[str] = []
    for plant, folder in folders.items():
        faults += files_missing(folder)
        faults += tasks_missing(folder, short=options.short, plant=plant)
        faults += planted(folder, PLANTED[plant]) if plant else undisturbed(folder)
    print(
        "\n".join(faults) or f"{options.folder}: the rehearsal left every file and row that it must"
    )
    if options.out:
        runs = {plant or "as they are": counts(folder) for plant, folder in folders.items()}
        found = {"provenance": provenance.collect("cpu"), "faults": faults, "runs": runs}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(faults))


def files_missing(folder: Path) -> Iterator[str]:
    """The report's missing files, or a note that it left more than can be copied back."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    yield from (f"{folder}: no {name}" for name in FILES if not (folder / name).is_file())
    if len(files) > MOST_FILES:
        yield f"{folder}: {len(files)} files, at most {MOST_FILES} may be"


def tasks_missing(folder: Path, *, short: bool, plant: str | None) -> Iterator[str]:
    """The tasks of the rehearsal that have no row."""
    told = {(row["stage"], row["task"]) for row in read(folder / "rows.jsonl") if "outcome" in row}
    first = [stage for stage in STAGES if stage.name in FIRST]
    for stage in shortened(first, short=short, plant=plant):
        for task in stage.tasks:
            if (stage.name, task.name) not in told:
                yield f"{folder}: {stage.name}/{task.name}: it did not run"


def undisturbed(folder: Path) -> Iterator[str]:
    """Tasks that did not end well, and wrong results."""
    for row in read(folder / "rows.jsonl"):
        if row.get("wrong") and row["task"] != "libraries":  # no CUDA library loads without CUDA
            yield f"{row['stage']}/{row['task']}: {row['wrong']}"
        if row.get("outcome", "done") != "done":
            yield f"{row['stage']}/{row['task']}: {row['outcome']}"


def planted(folder: Path, outcome: str) -> Iterator[str]:
    """Tasks that should have failed or hung and did not, or lost the row that they had written."""
    found = read(folder / "rows.jsonl")
    rows = {(row["stage"], row["task"]) for row in found if "outcome" not in row}
    for row in found:
        name = row["stage"], row["task"]
        if "outcome" in row and not (row["outcome"].startswith(outcome) and name in rows):
            yield f"{folder}: {'/'.join(name)}: {row['outcome']}, {'a' if name in rows else 'no'} row"


def counts(folder: Path) -> dict[str, dict[str, Any]]:
    """By stage how many tasks ended how, what their rows say, and seconds of all tasks together."""
    found: dict[str, dict[str, Any]] = {}
    for row in read(folder / "rows.jsonl"):
        stage = found.setdefault(
            row["stage"], {"tasks": Counter(), "rows": Counter(), "seconds": 0.0}
        )
        if "outcome" in row:
            stage["tasks"][row["outcome"].partition(" ")[0].strip(":")] += 1
            stage["seconds"] = round(stage["seconds"] + row["seconds"], 1)
        else:
            stage["rows"][result_of(row)] += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
