"""A plugin for pytest: every test's outcome is a row of the report as soon as it is known."""

import pytest

from benchmarks.gpu_report.task import rows_here


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A row for each test that was called, and for each that could not be prepared."""
    if report.when != "call" and report.passed:
        return
    facts = {"test": report.nodeid.partition("::")[2], "seconds": round(report.duration, 2)}
    if report.failed:
        facts["wrong"] = (report.longreprtext.strip() or "?").splitlines()[-1][:300]
    elif report.skipped:
        facts["skipped"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
    rows_here().write(**facts)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A failed test is a row of a file that has run to its end; only errors of pytest itself count as failures."""
    if exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.OK
