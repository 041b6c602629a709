"""A plugin for pytest: every test's outcome is a row of the report as soon as it is known."""

import os
from pathlib import Path

import pytest

from benchmarks.gpu_report.rows import Rows
from benchmarks.gpu_report.task import PlantedRows


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A row for each test that was called, and for each that could not be prepared."""
    if report.when != "call" and report.passed:
        return
    kind = PlantedRows if os.environ.get("REFSAM_REPORT_PLANT") else Rows
    out = Path(os.environ["REFSAM_REPORT_OUT"]) / "rows.jsonl"
    rows = kind(out, os.environ["REFSAM_REPORT_STAGE"], os.environ["REFSAM_REPORT_TASK"])
    facts = {"test": report.nodeid.partition("::")[2], "seconds": round(report.duration, 2)}
    if report.failed:
        facts["wrong"] = (report.longreprtext.strip() or "?").splitlines()[-1][:300]
    elif report.skipped:
        facts["skipped"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
    rows.write(**facts)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A failed test is a row of a file that has run to its end; only errors of pytest itself count as failures."""
    if exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.OK
