"""The output of `python -m refsam_kernels.info`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refsam_kernels import info, rel_pos_attention
from refsam_kernels.core.dispatch import BACKENDS, Dispatcher
from refsam_kernels.core.output import print_all


@pytest.fixture(autouse=True)
def no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFSAM_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def about(operator: str) -> list[str]:
    """The lines on one operator for tensors on the CPU."""
    return list(info.choice(Dispatcher.known[operator], "cpu"))


def test_names_versions_and_every_operator() -> None:
    lines = info.describe().splitlines()
    assert any(line.startswith(f"torch {torch.__version__}") for line in lines)
    assert "on cpu tensors" in lines
    for operator in Dispatcher.known:
        assert any(line.startswith(f"  {operator}: ") for line in lines)


@pytest.mark.parametrize("operator", sorted(Dispatcher.known))
def test_choice_is_what_runs_and_the_rest_has_a_reason(operator: str) -> None:
    first, *others = about(operator)
    chosen = first.removeprefix(f"{operator}: ")
    assert chosen in ("cpu", "fallback")
    explained = [line.split()[1].rstrip(":") for line in others]
    assert explained == [name for name in BACKENDS if name != chosen]
    assert others[-1] == "  not reference: runs only when asked for"
    assert others[0].startswith("  not triton: ")


def test_wish_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFSAM_BACKEND", "rel_pos_attention=reference")
    first, *others = about("rel_pos_attention")
    assert first == "rel_pos_attention: reference"
    assert others[-1] == "  not fallback: reference was asked for"
    qkv, table = torch.zeros(1, 2, 2, 6), torch.zeros(3, 2)
    rel_pos_attention(qkv, table, table, num_heads=1)
    monkeypatch.setenv("REFSAM_BACKEND", "rel_pos_attention=cuda")
    assert about("rel_pos_attention")[0] == "rel_pos_attention: cuda (asked for, but cannot run)"


def test_reads_the_build_report(tmp_path: Path) -> None:
    assert list(info.libraries(tmp_path)) == [
        "no library was built: run python -m refsam_kernels.build"
    ]
    report = {"_C_cpu": {"built": True, "compiler": "c++ 12"}, "_C_cuda": {"built": False, "reason": "no nvcc"}}  # fmt: skip
    (tmp_path / "_build.json").write_text(json.dumps(report))
    assert list(info.libraries(tmp_path)) == [
        "_C_cpu: built (compiler c++ 12)",
        "_C_cuda: left out, no nvcc",
    ]


def test_is_a_command(root: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "refsam_kernels.info"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root / "kernels"), "PATH": ""},
        check=True,
    )
    assert "rel_pos_attention: " in result.stdout
    assert result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(SystemExit, match="2"):
            print_all("a line")
    assert capsys.readouterr().err == "output: cannot be written (No space left on device)\n"


@pytest.mark.parametrize("text", ["a line", "many lines\n" * 10_000])
def test_a_reader_may_end_early(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        print_all(text)
        print("the interpreter's last flush", file=stdout, flush=True)
