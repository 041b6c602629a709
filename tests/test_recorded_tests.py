"""benchmarks.gates.recorded_tests: an ended run of tests goes on, and its summary hides nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gates.recorded_tests import Recorder, read, summaries


def left_after(recorder: Recorder, names: list[str]) -> list[str]:
    items: Any = [SimpleNamespace(nodeid=name) for name in names]
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    recorder.pytest_collection_modifyitems(config, items)
    return [item.nodeid for item in items]


def report(recorder: Recorder, test: str, when: str, outcome: str) -> None:
    fields: Any = {"nodeid": test, "when": when, "outcome": outcome, "duration": 1.0}
    recorder.pytest_runtest_logreport(
        pytest.TestReport(location=(test, 0, test), keywords={}, longrepr=None, **fields)
    )


def test_goes_on_at_the_same_commit_and_says_what_is_missing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "record.jsonl", is_worker=False)
    assert left_after(recorder, ["a", "b", "c", "d"]) == ["a", "b", "c", "d"]
    for when in ("setup", "call"):
        report(recorder, "a", when, "passed")
    report(recorder, "b", "call", "passed")
    report(recorder, "b", "teardown", "failed")
    report(recorder, "c", "setup", "skipped")
    assert left_after(recorder, ["a", "b", "c", "d"]) == ["d"]
    (found,) = summaries(read(recorder.path))
    assert found["failures"] == ["b"]
    assert [found[key] for key in ("passed", "failed", "skipped", "not_run")] == [1, 1, 1, 1]
    recorder.commit = "another"
    assert left_after(recorder, ["a", "d"]) == ["a", "d"]
    assert [each["not_run"] for each in summaries(read(recorder.path))] == [1, 2]


def test_only_one_process_writes(tmp_path: Path) -> None:
    worker = Recorder(tmp_path / "record.jsonl", is_worker=True)
    report(worker, "a", "call", "passed")
    assert left_after(worker, ["a"]) == ["a"]
    assert not worker.path.exists()
