"""Runs the tests of CUDA kernels on the CPU, in the emulator that tests/csrc/cuda_emulator is.

The library that it is built into takes the place of the compiled one in a process of its own, by `REFSAM_LIBRARIES`.

    python -m tests.kernels.emulator FOLDER [--sanitize] [SOURCE...]    # only sources whose names begin so, of those named
"""

import argparse
import fcntl
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from refsam_kernels import build, prerequisites
from refsam_kernels.core import libraries
from tests.kernels.processes import ROOT, run_tests

FOLDER = Path(__file__).parent / "cuda"
EMULATOR = ROOT / "tests" / "csrc" / "cuda_emulator"
IS_EMULATED = libraries.cuda_is_emulated()
# Without either, tests are collected all the same, to be skipped.
DEVICE = "cuda" if torch.cuda.is_available() and not IS_EMULATED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Accesses to memory call tests/csrc/cuda_emulator/races.cpp, functions that begin and end do not.
WATCHED = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]


def run_emulated(operators: Sequence[str], *options: str) -> None:
    """Runs tests/kernels/cuda/test_<operator>.py in the emulator; fails with the report. `options` are pytest's."""
    target = ROOT / "build" / "emulated"
    try:
        build_emulated(target)
    except prerequisites.BuildSkipped as reason:
        pytest.skip(str(reason))
    run_tests(FOLDER, operators, {"REFSAM_LIBRARIES": str(target)}, *options)


def build_emulated(target: Path, sanitize: bool = False, names: Sequence[str] = ("",)) -> None:
    """Builds `_C_cuda.so` for the CPU's tensors into the folder `target`, what changed only.

    Raises `BuildSkipped` if a tool is missing, `BuildError` if a source does not compile.
    """
    target = target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan = emulated_plan(target, sanitize, names)
        build.execute(plan)
        build.install(plan, target)
        entry = {"built": True, "emulated": True, **plan.toolchain}
        build.write_report(target, {"_C_cuda": entry})


def emulated_plan(target: Path, sanitize: bool = False, names: Sequence[str] = ("",)) -> build.Plan:
    """How the library is built; with `sanitize` it stops the process at the first bad address or undefined operation."""
    compiler = prerequisites.find_compiler()
    flags = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *emulator_flags()]
    if sanitize:
        flags += "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all".split()
    sources = [
        source for source in build.sources_of("cuda") if source.name.startswith(tuple(names))
    ]
    sources += sorted(EMULATOR.glob("*.cpp"))
    toolchain = {"compiler": prerequisites.first_line([*compiler, "--version"])}
    return build.make_plan(
        "_C_cuda",
        compiler,
        flags,
        target / "objects",
        sources,
        toolchain,
        partial(emulating, sanitize=sanitize),
    )


def emulator_flags() -> list[str]:
    """Flags of every emulated source, beside those of `emulating`; raises `BuildSkipped` without CUDA's headers."""
    # Uninitialised variables hold a pattern, as little a result as the NaN of uninitialised memory.
    flags = ["-std=c++20", "-O2", "-ftrivial-auto-var-init=pattern", "-Wno-unknown-pragmas"]
    return [*flags, "-isystem", str(cuda_headers()), f"-I{build.source_root()}", f"-I{EMULATOR}"]


def emulating(source: Path, sanitize: bool = False) -> list[str]:
    """Flags that make the compiler read the emulator's headers before a source, in place of those with the same guards.

    A kernel shows its accesses to memory to the emulator, or with `sanitize` to AddressSanitizer: GCC does one of both.
    """
    if source.suffix == ".cu":
        return ["-include", "cuda_emulator.h", "-x", "c++", *([] if sanitize else WATCHED)]
    own = source.parent == EMULATOR
    return [] if own else ["-include", "device.h", "-include", "launch.h"]


def cuda_headers() -> Path:
    """The folder of CUDA's own headers: triton brings them too. Raises `BuildSkipped` if there are none."""
    site = Path(sysconfig.get_path("purelib"))
    for folder in (
        site / "triton" / "backends" / "nvidia" / "include",
        Path("/usr/local/cuda/include"),
    ):
        if (folder / "cuda_fp16.h").is_file():
            return folder
    raise prerequisites.BuildSkipped(
        "emulating CUDA needs its headers: install triton or the CUDA toolkit"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("names", nargs="*", default=[""])
    arguments = parser.parse_args()
    build_emulated(arguments.folder, arguments.sanitize, arguments.names)
