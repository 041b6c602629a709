"""Shared by all tests: the markers, the kernels' log, and a summary of the tests that did not run."""

import logging
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """A failing test shows which backend ran: the kernels' log is captured from the lowest level on."""
    logging.getLogger("refsam_kernels").setLevel(logging.DEBUG)


def cuda_missing() -> str | None:
    """Why tests marked `gpu` cannot run here, or None."""
    import torch

    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return None if torch.cuda.is_available() else "no CUDA device"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips `slow` tests unless -m names them, and `gpu` tests where there is no device, each with its reason."""
    marked_gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = cuda_missing() if marked_gpu else None
    for item in marked_gpu:
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"gpu: {reason}"))
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what was skipped, by reason, so that a run without a GPU or without data does not look complete."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    if not reasons:
        return
    terminalreporter.section("not run")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:4d}  {reason}")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT
