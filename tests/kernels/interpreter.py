"""Runs the tests of Triton kernels in Triton's interpreter, on a machine without a GPU.

TRITON_INTERPRET is read when a kernel is decorated, so these tests need a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "triton"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
# The interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584).
DTYPES = [torch.float32, torch.float16, *([] if IS_INTERPRETED else [torch.bfloat16])]


def run_interpreted(operator: str) -> None:
    """Runs tests/kernels/triton/test_<operator>.py in the interpreter; fails with its report."""
    quiet = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "0"}
    path = FOLDER / f"test_{operator}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, str(path)],
        cwd=FOLDER.parents[2],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def on_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator for tensors on the CPU, computed on the GPU where there is one; its results are back on the CPU."""

    def moved(*, backend: str | None, **tensors: Tensor) -> Any:
        result = operator(backend=backend, **{k: x.to(DEVICE) for k, x in tensors.items()})
        return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()

    return moved
