"""The GPU report's stages, what it carries, and how its results are judged."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import registry
from benchmarks.gpu_report import __main__ as command
from benchmarks.gpu_report import machine, parcel, rehearsed, rows, wheels
from benchmarks.gpu_report.runner import interpreter
from benchmarks.gpu_report.stages import FIRST, STAGES
from benchmarks.gpu_report.stand_in import rehearsal_environment, shortened
from benchmarks.gpu_report.tasks import libraries as libraries_task
from benchmarks.gpu_report.tasks import operators as operators_task
from benchmarks.gpu_report.tasks import smoke as smoke_task
from refsam_kernels import build
from refsam_kernels.core.dispatch import BACKENDS


def test_an_operators_backends_are_smoked_apart() -> None:
    (smoke,) = (stage for stage in STAGES if stage.name == "smoke")
    names = [task.name for task in smoke.tasks]
    assert names[0] == "rel_pos_attention, triton"
    assert "mask_postprocess, cuda" in names
    assert "mask_loss, cuda" not in names  # there is none
    assert len(names) == len(set(names)) == 8 * 3 + 6


def test_a_gpu_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GPU_LIMIT", 1.0)
    monkeypatch.setenv("REFSAM_PYTHON", f"{sys.executable} -c 'import time; time.sleep(60)'")
    assert command.no_gpu() == "it did not answer in 1 s"


def test_rows_that_a_kill_cut_short_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows.Rows(path, "stage", "task").write(value=1)
    with path.open("a") as file:
        file.write('{"stage": "sta')
    assert [row["value"] for row in rows.read(path)] == [1]


def test_the_interpreter_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFSAM_PYTHON", raising=False)
    assert interpreter() == [sys.executable]
    monkeypatch.setenv("REFSAM_PYTHON", "/opt/python -P")
    assert interpreter() == ["/opt/python", "-P"]


def test_unknown_stages_and_no_gpu_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--only", "smok"]) == 2
    assert "--only: got smok, wanted some of precompile" in capsys.readouterr().out
    assert command.main(["--rows", str(tmp_path / "rows.jsonl"), "--only", "memcheck"]) == 2
    assert "rows.jsonl, wanted an earlier report's" in capsys.readouterr().out
    monkeypatch.setattr(command, "no_gpu", lambda: "no CUDA device")
    assert command.main(["--out", str(tmp_path / "report")]) == 2
    assert not (tmp_path / "report").exists()


def test_the_stages_fit_into_ten_minutes() -> None:
    """One after the other; what runs in the background runs beside them."""
    assert FIRST[-1] == "peers"  # which gets what is left
    limits = [s.limit_s for s in STAGES if s.name in FIRST[:-1] and not s.is_background]
    assert sum(limits) <= 600
    names = [task.name for stage in STAGES for task in stage.tasks]
    assert "kernels/triton/test_rel_pos_attention.py" in names
    assert "session/test_cuda_graphs.py" in names


def test_every_file_with_tests_for_a_gpu_is_a_task() -> None:
    (stage,) = (stage for stage in STAGES if stage.name == "tests")
    listed = {Path(task.command[-1]) for task in stage.tasks}
    tests = Path(__file__).parent
    marked = {
        path
        for path in tests.rglob("test_*.py")
        if path.parent.name in ("triton", "cuda") or "@pytest.mark.gpu" in path.read_text()
    }
    assert listed == marked - {Path(__file__)}


def test_tests_for_a_gpu_import_only_what_its_machine_has() -> None:
    (stage,) = (stage for stage in STAGES if stage.name == "tests")
    # The kernels' own files run with the oldest environment, which has no more.
    paths = [
        p for task in stage.tasks if "/triton/" not in (p := task.command[-1]) and "/cuda/" not in p
    ]
    code = (
        "import sys, pytest\n"
        "for name in ('av', 'gradio', 'xformers'): sys.modules[name] = None\n"
        "sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False
    )
    assert len(paths) == 3
    assert found.returncode == 0, found.stdout


def test_a_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    wanted = shortened(STAGES, short=True, plant=None)
    assert [stage.name for stage in wanted] == [stage.name for stage in STAGES]
    assert {len(stage.tasks) for stage in wanted} == {1, 2}
    # A failure and a hang are planted into a function's processes and into pytest's.
    assert [stage.name for stage in shortened(STAGES, short=True, plant="hang")] == [
        "smoke",
        "tests",
    ]
    assert len(shortened(STAGES, short=False, plant="fail")) == len(STAGES)
    assert rehearsal_environment(tmp_path)["REFSAM_REPORT_REHEARSAL"]


def make_wheel(folder: Path, name: str, members: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for path, text in members.items():
            archive.writestr(path, text)


def test_carried_wheels_can_be_imported_and_hide_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    make_wheel(folder, "carried", {"carried_package/__init__.py": "value = 1"})
    make_wheel(folder, "json", {"json/__init__.py": "raise ImportError"})
    with wheels.unpacked(folder) as site:
        assert site is not None
        assert sorted(path.name for path in site.iterdir()) == ["carried_package"]
    assert not site.exists()
    with wheels.unpacked(None) as site:
        assert site is None


def test_a_wheel_that_writes_elsewhere_is_refused(tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "evil", {"../evil.py": ""})
    with (
        pytest.raises(ValueError, match="outside the archive"),
        wheels.unpacked(tmp_path / "wheels"),
    ):
        pass
    with pytest.raises(ValueError, match="wanted a folder with wheels"), wheels.unpacked(tmp_path):
        pass


def test_a_library_that_cannot_be_loaded_is_a_wrong_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.write_report(tmp_path, {"_C_cuda": {"built": True, "architectures": "9.0"}})
    monkeypatch.setenv("REFSAM_LIBRARIES", str(tmp_path))
    assert libraries_task.described("cuda", None) == {"architectures": "9.0"}
    reason = libraries_task.refusal("cpu")
    assert reason is not None
    assert "_C_cpu.so was not built" in reason
    assert "cannot be loaded: " in libraries_task.described("cpu", reason)["wrong"]


def test_libraries_that_cannot_be_loaded_are_built_where_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    monkeypatch.setenv("REFSAM_LIBRARIES", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(libraries_task, "IS_REHEARSAL", False)
    monkeypatch.setattr(libraries_task, "refusal", lambda name: None if built else "no such file")
    monkeypatch.setattr(libraries_task.build, "build_all", built.append)
    libraries_task.run(rows.Rows(tmp_path / "rows.jsonl", "libraries", "libraries"))
    assert built == [tmp_path]
    told = [(row["library"], "wrong" in row) for row in rows.read(tmp_path / "rows.jsonl")]
    assert told == [("cpu", True), ("cuda", True), ("cpu", False), ("cuda", False)]


def test_a_planted_failure_comes_after_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFSAM_REPORT_PLANT", "fail")
    from benchmarks.gpu_report.task import PlantedRows

    with pytest.raises(RuntimeError, match="planted"):
        PlantedRows(tmp_path / "rows.jsonl", "stage", "task").write(value=1)
    assert json.loads((tmp_path / "rows.jsonl").read_text())["value"] == 1
    assert os.environ["REFSAM_REPORT_PLANT"] == "fail"


def test_the_parcel_holds_wheels_and_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(parcel.subprocess, "run", lambda command, check: commands.append(command))

    def build_all(target: Path) -> None:
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"
        (target / "_C_cuda.so").write_bytes(b"library")

    monkeypatch.setattr(parcel.build, "build_all", build_all)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.setenv("REFSAM_BUILD_CUDA", "")
    (tmp_path / "parcel" / "wheels").mkdir(parents=True)
    (tmp_path / "parcel" / "wheels" / "pydantic-1.0-py3-none-any.whl").touch()
    assert parcel.main([str(tmp_path / "parcel"), "--wheels"]) == 0
    assert [
        *(tmp_path / "parcel" / "wheels").iterdir()
    ] == []  # no second version beside the new one
    assert not (tmp_path / "parcel" / "libraries").exists()
    assert parcel.main([str(tmp_path / "parcel")]) == 0
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert "pydantic-core" in commands[0]
    printed = capsys.readouterr().out
    assert "libraries/_C_cuda.so" in printed
    assert "make gpu-report REFSAM_PYTHON=python3" in printed


def leave_rehearsal(folder: Path, plant: str | None, outcome: str) -> None:
    """Leaves files and rows as a short rehearsal does whose tasks all wrote a row and ended so."""
    folder.mkdir(parents=True)
    for name in rehearsed.FILES:
        (folder / name).touch()
    for stage in shortened(STAGES, short=True, plant=plant):
        for task in stage.tasks:
            writer = rows.Rows(folder / "rows.jsonl", stage.name, task.name)
            writer.write(value=1)
            writer.write(outcome=outcome, seconds=1.5)


def test_a_rehearsal_is_judged_by_its_files_and_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    leave_rehearsal(out, None, "done")
    leave_rehearsal(out / "fail", "fail", "failed: exit code 1: planted failure")
    leave_rehearsal(out / "hang", "hang", "killed at its limit of 45 s")
    result = tmp_path / "result.json"
    assert rehearsed.main([str(out), "--short", "--out", str(result)]) == 0
    told = json.loads(result.read_text())
    assert told["faults"] == []
    smoke = {"tasks": {"killed": 2}, "rows": {"good": 2}, "seconds": 3.0}
    assert told["runs"]["hang"]["smoke"] == smoke
    rows.Rows(out / "rows.jsonl", "stage", "task").write(wrong="off")
    rows.Rows(out / "fail" / "rows.jsonl", "stage", "other").write(outcome="done", seconds=1.0)
    (out / "hang" / "summary.txt").unlink()
    (out / "hang" / "rows.jsonl").unlink()
    assert rehearsed.main([str(out), "--short"]) == 1
    printed = capsys.readouterr().out
    assert "stage/task: off" in printed
    assert "stage/other: done, no row" in printed
    assert "no summary.txt" in printed
    assert "hang: smoke/rel_pos_attention, triton: it did not run" in printed
    # A long one has more tasks.
    assert rehearsed.main([str(out)]) == 1
    assert "tuning/80-0: it did not run" in capsys.readouterr().out


def test_a_rehearsal_takes_no_gradient_from_an_interpreter_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's operators have no backward: Triton's would run, and multiply bit patterns of bfloat16."""
    monkeypatch.setattr(machine, "IS_REHEARSAL", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype, is_taken in ((torch.float32, True), (torch.bfloat16, False)):
        with smoke_task.without_wrong_products(dtype):
            assert BACKENDS["triton"].supports("cpu") == is_taken


def test_a_case_that_cannot_be_made_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: str) -> registry.Workload:
        raise RuntimeError("no such peer")

    def fine(device: str) -> registry.Workload:
        return registry.Workload({"ours": lambda: 1}, lambda result: None, 1, 1, {})

    cases = [registry.Case("op", name, "", make) for name, make in (("a", broken), ("b", fine))]
    monkeypatch.setattr(operators_task, "load_cases", lambda names, device: cases)
    monkeypatch.setattr(operators_task, "IS_REHEARSAL", False)
    monkeypatch.setattr(operators_task, "timed", lambda call, seconds: {"ms": float(call())})
    monkeypatch.setattr(machine, "IS_REHEARSAL", True)  # no device that could have broken
    operators_task.run(rows.Rows(tmp_path / "rows.jsonl", "operators", "op"), "op")
    first, second = rows.read(tmp_path / "rows.jsonl")
    assert (first["case"], first["wrong"]) == ("a", "RuntimeError: no such peer")
    assert (second["case"], second["provider"], second["ms"]) == ("b", "ours", 1.0)
