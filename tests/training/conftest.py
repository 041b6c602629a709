"""Shared by all tests of training."""

import pytest


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process draw no learning curve, which costs more than their steps; test_resume.py asks for one."""
    monkeypatch.setattr("refsam.training.loop.draw_curve", lambda log, path: [])
