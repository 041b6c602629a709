"""The GPU report's first step: libraries built elsewhere are used as they are, what cannot be loaded is built."""

from pathlib import Path

import pytest

from benchmarks.report import gpu as gpu_report
from refsam_kernels import build


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the report would have run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(gpu_report, "record", lambda command, path: commands.append(command))
    return commands


def test_libraries_that_can_be_loaded_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: list[list[str]]
) -> None:
    build.write_report(tmp_path, {"_C_cuda": {"built": True, "architectures": "9.0"}})
    monkeypatch.setattr(gpu_report, "refusal", lambda name: None)
    monkeypatch.setenv("REFSAM_LIBRARIES", str(tmp_path))
    gpu_report.load_or_build(tmp_path / "libraries.txt")
    assert not built
    assert (tmp_path / "libraries.txt").read_text().splitlines() == [
        "_C_cpu.so is loaded (nothing is known of its build)",
        "_C_cuda.so is loaded (architectures 9.0)",
    ]


def test_libraries_that_cannot_be_loaded_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: list[list[str]]
) -> None:
    reasons = iter(["no such symbol", None, None, None])
    monkeypatch.setattr(gpu_report, "refusal", lambda name: next(reasons))
    gpu_report.load_or_build(tmp_path / "libraries.txt")
    assert [command[-1] for command in built] == [build.__file__]
    text = (tmp_path / "libraries.txt").read_text()
    assert "_C_cpu.so cannot be loaded: no such symbol" in text
    assert text.index("Built here") < text.index("_C_cpu.so is loaded")


def test_refusal_is_the_loaders_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFSAM_LIBRARIES", str(tmp_path))
    assert "_C_cpu.so was not built" in (gpu_report.refusal("cpu") or "")


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(["--out", str(tmp_path / "report")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "report").exists()
