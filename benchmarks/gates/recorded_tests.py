"""A run of tests that is too long for one sitting, and its committed summary.

    make test-oldest OPTIONS="-p benchmarks.gates.recorded_tests --record out/oldest.jsonl"    # again until all have run
    .venv-oldest/bin/python -m benchmarks.gates.recorded_tests out/oldest.jsonl --out benchmarks/results/oldest.json

As a pytest plugin it writes each outcome as soon as it is known, with the commit, and leaves out the tests that have one at
this commit: a run that was ended goes on where it stopped.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import provenance

Line = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --record."""
    parser.addoption("--record", type=Path, metavar="FILE", help="JSON lines, to go on with")


def pytest_configure(config: pytest.Config) -> None:
    """Records, where --record is given."""
    if config.option.record:
        recorder = Recorder(config.option.record, is_worker=hasattr(config, "workerinput"))
        config.pluginmanager.register(recorder, "recorder")


class Recorder:
    """The outcomes in a file, of the commit that is checked out; of xdist's processes the first one writes."""

    def __init__(self, path: Path, is_worker: bool) -> None:
        self.path, self.is_worker = path.resolve(), is_worker
        self.commit = provenance.run("git", "rev-parse", "HEAD")

    def write(self, **line: Any) -> None:
        """Adds a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"commit": self.commit, **line}) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leaves out what has an outcome."""
        lines = read(self.path) if self.path.is_file() else []
        known = {line.get("test") for line in lines if line["commit"] == self.commit}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        if not self.is_worker:
            self.write(collected=len(items))
        items[:] = [item for item in items if item.nodeid not in known]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes the call's outcome, and whatever went wrong around it."""
        if not self.is_worker and (report.when == "call" or not report.passed):
            seconds = round(report.duration, 2)
            self.write(test=report.nodeid, outcome=report.outcome, seconds=seconds)


def read(path: Path) -> list[Line]:
    """The lines of a record."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def summaries(lines: Iterable[Line]) -> list[Line]:
    """Counts of the outcomes at each commit in a record, in the order of its lines."""
    lines = list(lines)
    commits = dict.fromkeys(line["commit"] for line in lines)
    return [summary([line for line in lines if line["commit"] == commit]) for commit in commits]


def summary(lines: Sequence[Line]) -> Line:
    """Counts of the outcomes at one commit; a test that failed in any phase failed."""
    outcomes: dict[str, str] = {}
    for line in (line for line in lines if "test" in line):
        if outcomes.get(line["test"]) != "failed":
            outcomes[line["test"]] = line["outcome"]
    counts = Counter(outcomes.values())
    collected = max(line.get("collected", 0) for line in lines)
    return {
        "commit": lines[0]["commit"],
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "not_run": collected - len(outcomes),
        "seconds": round(sum(line.get("seconds", 0) for line in lines)),
        "failures": sorted(test for test, outcome in outcomes.items() if outcome == "failed"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Writes the summaries of a record, and which versions ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    origin = provenance.collect("cpu")
    found: dict[str, Any] = {"command": "make test-oldest"}
    found |= {key: origin[key] for key in ("time", "hardware", "versions")}
    found["runs"] = summaries(read(options.record))
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
