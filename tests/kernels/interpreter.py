"""Runs the tests of Triton kernels in Triton's interpreter, on a machine without a GPU.

TRITON_INTERPRET is read when a kernel is decorated, so these tests need a process of their own.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.processes import run_tests

FOLDER = Path(__file__).parent / "triton"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
# The interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584).
DTYPES = [torch.float32, torch.float16, *([] if IS_INTERPRETED else [torch.bfloat16])]


def slow_in_interpreter(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test `slow`, to run when asked for by -m slow, in the interpreter only: on a GPU every test is quick."""
    return pytest.mark.slow(test) if IS_INTERPRETED else test


def run_interpreted(operators: Sequence[str], *options: str) -> None:
    """Runs tests/kernels/triton/test_<operator>.py in the interpreter; fails with the report. `options` are pytest's."""
    run_tests(FOLDER, operators, {"TRITON_INTERPRET": "1"}, *options)


def on_device(operator: Callable[..., Any], device: str = DEVICE) -> Callable[..., Any]:
    """The operator for tensors on the CPU, computed on the device, the GPU where there is one; results are back on the CPU."""

    def moved(*, backend: str | None, **tensors: Tensor) -> Any:
        result = operator(backend=backend, **{k: x.to(device) for k, x in tensors.items()})
        return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()

    return moved
