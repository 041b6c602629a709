"""Measurements on a GPU are fair: random values, float32 without TF32, weights drawn on the device, kernels apart from Python."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import __main__ as command
from benchmarks import measure, run
from benchmarks.gpu_report import machine
from benchmarks.measure import Ceiling, Times
from benchmarks.registry import Case, Workload

SMALL = 16  # so few values may be equal by chance or by nature: a scale, a level's weights


def tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that a measurement holds: in its arguments, closures, modules and dataclasses."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        inside = [*value.parameters()]
    elif isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, dict):
        inside = [*value.values()]
    elif isinstance(value, list | tuple):
        inside = [*value]
    elif isinstance(value, MethodType):
        inside = [value.__self__]
    elif isinstance(value, FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or ()]
    elif type(value).__module__.partition(".")[0] in ("benchmarks", "refsam"):
        inside = [*getattr(value, "__dict__", {}).values()]
    for item in inside:
        yield from tensors_in(item, seen)


def constant_in(value: Any) -> list[str]:
    """Matrices and larger tensors of floating point numbers that are all the same; norms' weights and biases may be."""
    found = []
    for x in tensors_in(value, set()):
        if x.is_floating_point() and x.dim() > 1 and x.numel() > SMALL:
            values = x.detach()[~x.isnan()]
            if values.numel() and bool((values == values[0]).all()):
                found.append(f"{tuple(x.shape)} of {float(values[0])}")
    return found


# Runs tasks of the report on their stand-ins, but looks at each measurement instead of taking it.
LOOK = """
import os, sys
from importlib import import_module
from pathlib import Path
import torch
from torch.overrides import TorchFunctionMode
from benchmarks.gpu_report import machine
from benchmarks.gpu_report.rows import Rows
from tests.test_gpu_measurements import constant_in

class Draws(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        drawn = function in (torch.randn, torch.rand, torch.empty)
        if drawn and options.get("device") is None and options.get("dtype") != torch.uint8:
            print("not drawn on the device:", function.__name__, arguments)
        return function(*arguments, **options)

def look(rows, measuring, **facts):
    print("measures", facts)
    if torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32:
        print("TF32:", facts)
    made = None
    if task == "encoder":  # a provider is built when it is measured
        with torch.device(machine.DEVICE):
            made = measuring.args[0]()
    for text in constant_in([measuring, made]):
        print("constant:", text, facts)

machine.attempt = look
for words in sys.argv[1:]:
    task, *arguments = words.split()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with Draws():
        rows = Rows(Path(os.environ["ROWS"]), task, task)
        import_module(f"benchmarks.gpu_report.tasks.{task}").run(rows, *arguments)
"""
OPERATORS = "adapter_mlp adapter_projection dense_attention mask_loss mask_postprocess mask_upscale rel_pos_attention"


@pytest.mark.parametrize(
    "tasks",
    [
        pytest.param(
            (
                "encoder vit_b",
                "attention 64",
                "frames 1",
                f"operators {OPERATORS} token_image_attention",
                "machine",
            ),
            id="inference",
        ),
        pytest.param(("training vit_b",), id="training", marks=pytest.mark.slow),
    ],
)
def test_what_the_gpu_report_measures(tasks: tuple[str, ...], tmp_path: Path) -> None:
    environment = {"REFSAM_REPORT_REHEARSAL": "1", "ROWS": str(tmp_path / "rows.jsonl")}
    found = subprocess.run(
        [sys.executable, "-c", LOOK, *tasks],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    faults = [line for line in lines if line.startswith(("not drawn", "TF32", "constant"))]
    assert not faults
    assert sum(line.startswith("measures") for line in lines) >= 4 * len(tasks) - 1


def test_the_limits_are_those_of_random_values(monkeypatch: pytest.MonkeyPatch) -> None:
    spreads: list[float] = []

    def look(providers: dict[str, Any], device: str, seconds: float) -> dict[str, Times]:
        spreads.extend(float(x.float().std()) for x in tensors_in(providers, set()))
        return {name: Times(1.0, 1.0, 1.0, 1) for name in providers}

    monkeypatch.setattr(measure, "time_interleaved", look)
    measure.measure_ceiling("cpu")
    assert spreads == pytest.approx([1.0] * 6, abs=0.01)


def test_the_command_measures_without_tf32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags: list[bool] = []

    def look(device: str) -> Ceiling:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        flags.extend((matmul.allow_tf32, cudnn.allow_tf32))
        return CEILING

    monkeypatch.setattr(command, "measure_ceiling", look)
    monkeypatch.setattr(command, "load_cases", lambda *_, **__: [])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert flags == [False, False]


# A call of five milliseconds, of which the kernels take one: what a timer and a replay say of it.
EAGER_S, KERNELS_S = 5e-3, 1e-3
CEILING = Ceiling(1e9, {torch.float32: 1e9})


def test_the_report_times_kernels_by_replay_and_python_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "IS_REHEARSAL", False)
    monkeypatch.setattr(measure, "time_cuda", lambda call: call())
    monkeypatch.setattr(measure, "captured", lambda call: lambda: KERNELS_S)
    found = machine.timed(lambda: EAGER_S)
    assert (found["median_ms"], found["eager_ms"]) == (1e3 * KERNELS_S, 1e3 * EAGER_S)


def test_benchmarks_time_kernels_by_replay_and_python_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def replay(call: Callable[[], float]) -> Callable[[], float]:
        if call() != EAGER_S:
            raise RuntimeError("it looks at values")
        return lambda: KERNELS_S

    monkeypatch.setattr(measure, "time_cuda", lambda call: call())
    monkeypatch.setattr(measure, "captured", replay)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(run, "peak_memory", lambda *_: None)
    providers = {"ours": lambda: EAGER_S, "looks at values": lambda: 3 * EAGER_S}
    workload = Workload(providers, lambda result: None, 1, 1, {})
    case = Case("operator", "case", "ours", lambda device: workload)
    ours, other = run.run_case(case, "cuda", CEILING, 0.01)
    assert (ours["median_ms"], ours["eager_ms"]) == (1e3 * KERNELS_S, 1e3 * EAGER_S)
    # Without a graph both are the call's.
    assert (other["median_ms"], other["eager_ms"]) == (3e3 * EAGER_S, 3e3 * EAGER_S)
