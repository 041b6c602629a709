"""Loads the compiled libraries, each when a backend first needs it.

They are in the package's folder; `REFSAM_LIBRARIES` names another folder, such as that of a build with sanitizers.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refsam_kernels.build import PACKAGE, read_report

INSTRUCTION_SET_VARIABLE = "REFSAM_CPU_INSTRUCTION_SET"
OLDEST_CAPABILITY = (8, 0)  # of a GPU, the oldest that the CUDA and Triton kernels support


@cache
def load(name: str) -> Any:
    """The operators of the library `_C_<name>.so` ("cpu" or "cuda"): the namespace `torch.ops.refsam_kernels_<name>`.

    Raises `ImportError` with the reason if the library was not built or torch has no CUDA, `OSError` if it cannot be loaded.
    """
    if name == "cuda" and torch.version.cuda is None and not cuda_is_emulated():
        raise ImportError("torch has no CUDA here")
    path = folder() / f"_C_{name}.so"
    if not path.is_file():
        raise ImportError(f"{path} was not built: {why_not_built(path.stem, path.parent)}")
    torch.ops.load_library(path)
    return getattr(torch.ops, f"refsam_kernels_{name}")


def folder() -> Path:
    """Folder of the libraries."""
    return Path(os.environ.get("REFSAM_LIBRARIES") or PACKAGE)


def instruction_set() -> str:
    """The CPU's instruction set that is requested by name, or "" for the best one of the processor.

    From the most to the least wanted: avx512bf16, avx512vnni, avx512, avx512vl (8-bit products as avxvnni computes them, for
    tests), avxvnni, avx2, portable.
    """
    return os.environ.get(INSTRUCTION_SET_VARIABLE, "")


@cache
def cuda_is_emulated() -> bool:
    """Whether the CUDA library is the tests' one, whose kernels run on the CPU's tensors (tests/kernels/emulator.py)."""
    return bool(read_report(folder()).get("_C_cuda", {}).get("emulated"))


def reasons_against_device(tensor: Tensor) -> list[str]:
    """Why the CUDA and Triton kernels cannot run on the tensor's GPU; empty if they can, or the tensor is on none."""
    if not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= OLDEST_CAPABILITY:
        return []
    name = torch.cuda.get_device_name(tensor.device)
    return [f"needs compute capability {'.'.join(map(str, OLDEST_CAPABILITY))}, got {name}"]


def why_not_built(library: str, folder: Path = PACKAGE) -> str:
    """The reason that the build report gives for leaving a library out."""
    entry = read_report(folder).get(library, {})
    return entry.get("reason") or "run python -m refsam_kernels.build"
