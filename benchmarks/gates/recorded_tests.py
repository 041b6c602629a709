"""A run of tests that is too long for one sitting, and its committed summary.

    make test-oldest OPTIONS="-p benchmarks.gates.recorded_tests --record out/oldest.jsonl"    # again until all have run
    .venv-oldest/bin/python -m benchmarks.gates.recorded_tests out/oldest.jsonl --out benchmarks/results/oldest.json

As a pytest plugin it writes each outcome as soon as it is known, with the commit, and leaves out the tests that have one at
this commit: a run that was ended goes on where it stopped.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
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


def summary(lines: Iterable[Line]) -> Line:
    """Counts of the outcomes at the last commit in a record; a test that failed in any phase failed."""
    lines = list(lines)
    commit = lines[-1]["commit"]
    outcomes: dict[str, str] = {}
    collected, seconds = 0, 0.0
    for line in (line for line in lines if line["commit"] == commit):
        if "test" not in line:
            collected = max(collected, line["collected"])
            continue
        seconds += line["seconds"]
        if outcomes.get(line["test"]) != "failed":
            outcomes[line["test"]] = line["outcome"]
    counts = Counter(outcomes.values())
    return {
        "commit": commit,
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "not_run": collected - len(outcomes),
        "seconds": round(seconds),
        "failures": sorted(test for test, outcome in outcomes.items() if outcome == "failed"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Writes the summary of a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    origin = provenance.collect("cpu")
    found = {key: origin[key] for key in ("time", "command", "hardware", "versions")}
    found |= {"tests": "make test-oldest", **summary(read(options.record))}
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
