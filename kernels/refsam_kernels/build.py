"""Compiles the kernel libraries: `setup.py` runs this during installation, `python -m refsam_kernels.build` later.

Nothing here imports torch: its headers and libraries are found by path, and the libraries use its stable ABI (torch's
documentation, "LibTorch Stable ABI"), so one file serves every torch from 2.10 on and every Python. Two libraries come out,
`_C_cpu.so` and `_C_cuda.so`; they are separate because the CUDA one cannot be loaded by a torch without CUDA.

`REFSAM_BUILD_CUDA` 1 requires the CUDA library, 0 forbids it, unset builds it where torch has CUDA and nvcc is found.
`TORCH_CUDA_ARCH_LIST`, `CUDA_HOME` and `CXX` are honoured. ninja and ccache are used if present.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from refsam_kernels import prerequisites
else:  # loaded or run by its path: importing the package would import torch
    _spec = importlib.util.spec_from_file_location(
        "refsam_kernels_prerequisites", Path(__file__).with_name("prerequisites.py")
    )
    prerequisites = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(prerequisites)

PACKAGE = Path(__file__).resolve().parent
REPORT = "_build.json"
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, as torch/csrc/stable/version.h spells it
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512".split()
AVX2 = ["-mavx2", "-mfma"]
# Flags of the sources in csrc/cpu by the end of their names, on x86-64: the library asks the processor before it calls them.
INSTRUCTION_SETS = {
    "_avx2": AVX2,
    "_avxvnni": AVX2,  # the sources hold these instructions as text, which needs no flag
    "_avx512vl": AVX2,
    "_avx512": AVX512,
    "_avx512vnni": [*AVX512, "-mavx512vnni"],
    "_avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}


@dataclass(frozen=True)
class Step:
    """One command of a build: `command` makes `output` from `inputs`; a compiler lists headers in `depfile`."""

    output: Path
    inputs: tuple[Path, ...]
    command: tuple[str, ...]
    depfile: Path | None = None

    @property
    def log(self) -> Path:
        """File of the command's messages, kept so that an unchanged object still has them."""
        return self.output.with_suffix(".log")

    @property
    def shell_line(self) -> str:
        """The command for a POSIX shell, messages to the log, which is shown if it fails."""
        log = shlex.quote(str(self.log))
        return f"{shlex.join(self.command)} > {log} 2>&1 || {{ cat {log}; exit 1; }}"


@dataclass(frozen=True)
class Plan:
    """Commands that build one library: objects in any order, then the link."""

    library: str
    compile: tuple[Step, ...]
    link: Step
    toolchain: dict[str, str]


@dataclass(frozen=True)
class KernelResources:
    """Registers and spills of one kernel on one architecture, from ptxas; spills in bytes per thread."""

    kernel: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int


def source_root() -> Path:
    """The folder csrc: inside an installed package, or beside `kernels/` in a checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "csrc"


def build_root() -> Path:
    """Folder of objects between builds: in the checkout, or in the user's cache for an installed package."""
    if not (PACKAGE / "csrc").is_dir():
        return PACKAGE.parents[1] / "build" / "kernels"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "refsam_kernels"


def cpu_plan(sanitize: bool = False) -> Plan:
    """The plan to build `_C_cpu.so` here; raises `BuildSkipped` with the reason if it cannot be built.

    With `sanitize` it stops the process at the first bad address or undefined operation.
    """
    torch, compiler = prerequisites.supported_torch(), prerequisites.find_compiler()
    flags = "-O3 -fPIC -fvisibility=hidden -Wall -Wextra".split()
    objects = build_root() / "_C_cpu"
    if sanitize:
        flags += "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all".split()
        objects = build_root() / "_C_cpu_sanitized"
    toolchain = {
        "compiler": prerequisites.first_line([*compiler, "--version"]),
        "torch": torch.version,
    }
    return make_plan("_C_cpu", compiler, flags, objects, sources_of("cpu"), toolchain)


def cuda_plan() -> Plan:
    """The plan to build `_C_cuda.so` here; raises `BuildSkipped` with the reason if it cannot be built."""
    torch, nvcc = prerequisites.supported_torch(), prerequisites.find_nvcc()
    compiler, *options = (
        word for word in prerequisites.find_compiler() if not prerequisites.is_launcher(word)
    )
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    prerequisites.refuse_other_cuda(version, torch)
    names = prerequisites.architectures(nvcc)
    # USE_CUDA: without it torch's headers hide the current stream when torch itself has no CUDA.
    flags = "-O3 -lineinfo -DUSE_CUDA -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden,-Wall".split()
    flags += [f"-ccbin={compiler}", *(f"-Xcompiler={option}" for option in options)]
    flags += prerequisites.gencode(names)
    toolchain = {
        "compiler": version.splitlines()[-1],
        "torch": torch.version,
        "architectures": " ".join(names),
    }
    objects = build_root() / "_C_cuda"
    return make_plan("_C_cuda", (nvcc,), flags, objects, sources_of("cuda"), toolchain)


def sources_of(folder: str) -> list[Path]:
    """The sources of `csrc/<folder>`."""
    files = (source_root() / folder).iterdir()
    return sorted(path for path in files if path.suffix in (".cpp", ".cu"))


def sources_hash() -> str:
    """SHA-256 over the libraries' sources."""
    found = hashlib.sha256()
    for path in sorted(source_root().rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            found.update(path.read_bytes())
    return found.hexdigest()


def make_plan(
    library: str,
    compiler: tuple[str, ...],
    flags: list[str],
    objects: Path,
    sources: Iterable[Path],
    toolchain: dict[str, str],
    own_flags: Callable[[Path], list[str]] | None = None,
) -> Plan:
    """The compile steps of every source into `objects`, and the link step of the library.

    `own_flags` gives a source's arguments beside `flags`; `instruction_set` if not given.
    """
    torch, own_flags = prerequisites.supported_torch(), own_flags or instruction_set
    ccache = None if prerequisites.is_launcher(compiler[0]) else shutil.which("ccache")
    prefix = [ccache, *compiler] if ccache else [*compiler]
    prefix += ["-std=c++20", "-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    prefix += [*flags, "-isystem", str(torch.root / "include"), f"-I{source_root()}"]
    compile_steps = []
    for source in sources:
        output, depfile = objects / f"{source.name}.o", objects / f"{source.name}.d"
        files = ["-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        command = (*prefix, *own_flags(source), *files)
        compile_steps.append(Step(output, (source,), command, depfile))
    outputs = tuple(step.output for step in compile_steps)
    output = objects / f"{library}.so"
    # libtorch.so needs libtorch_cuda.so where torch has CUDA, so a library linked against a torch without it finds
    # its symbols on such a machine all the same. --no-as-needed: no symbol of ours is defined in libtorch.so itself.
    linker = ["-Xlinker", "--no-as-needed", f"-L{torch.root / 'lib'}", "-ltorch", "-ltorch_cpu"]
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    link = (*compiler, "-shared", *sanitizers, *map(str, outputs), *linker, "-o", str(output))
    toolchain |= {"sources": sources_hash()}
    return Plan(library, tuple(compile_steps), Step(output, outputs, link), toolchain)


def instruction_set(source: Path) -> list[str]:
    """The compiler's arguments for a source that is for one instruction set, by the end of its name."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return INSTRUCTION_SETS.get(source.stem[source.stem.rfind("_") :], [])


def find_ninja() -> str | None:
    """ninja of the search path or of the environment that is installed into."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def execute(plan: Plan) -> None:
    """Builds the library in its object folder; raises `BuildError` with the compiler's messages."""
    import fcntl  # POSIX only, as the libraries are: `find_compiler` has refused other platforms

    folder = plan.link.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ninja := find_ninja():
            (folder / "build.ninja").write_text(ninja_file(plan))
            run_shell(shlex.join([ninja, "-C", str(folder)]))
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda step: run_shell(step.shell_line), plan.compile))
        run_shell(plan.link.shell_line)


def run_shell(line: str) -> None:
    """Runs one shell line; raises `BuildError` with its output if it fails."""
    result = subprocess.run(
        line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        raise prerequisites.BuildError(f"compiling failed:\n{result.stdout}")


def ninja_file(plan: Plan) -> str:
    """The plan in ninja's language: unchanged objects, headers included, are not rebuilt."""

    def quote(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    text = "rule run\n  command = $line\n"
    text += "rule compile\n  command = $line\n  deps = gcc\n  depfile = $dep\n"
    for step in (*plan.compile, plan.link):
        rule = "compile" if step.depfile else "run"
        text += f"build {quote(str(step.output))}: {rule} {' '.join(map(quote, map(str, step.inputs)))}\n"
        text += f"  line = {step.shell_line.replace('$', '$$')}\n"
        text += f"  dep = {step.depfile}\n" if step.depfile else ""
    return text


def kernel_resources(plan: Plan) -> list[KernelResources]:
    """Registers and spills of every kernel and architecture, as ptxas printed them when it made the objects."""
    entry = r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    pattern = re.compile(entry + r".*?Used (\d+) registers", re.DOTALL)
    found = []
    for step in plan.compile:
        for kernel, architecture, stores, loads, registers in pattern.findall(step.log.read_text()):
            found.append(
                KernelResources(kernel, architecture, int(registers), int(stores), int(loads))
            )
    return found


def install(plan: Plan, target: Path) -> Path:
    """Copies the built library into the package under a temporary name and renames it: a running process keeps its own."""
    target.mkdir(parents=True, exist_ok=True)
    final = target / plan.link.output.name
    temporary = final.with_suffix(".partial")
    shutil.copy2(plan.link.output, temporary)
    os.replace(temporary, final)
    return final


def build_mode() -> bool | None:
    """`REFSAM_BUILD_CUDA`: True requires the CUDA library, False forbids it, None builds it where torch has CUDA."""
    value = os.environ.get("REFSAM_BUILD_CUDA", "")
    if value not in ("", "0", "1"):
        raise prerequisites.BuildError(f"REFSAM_BUILD_CUDA: got {value!r}, wanted 0, 1 or nothing")
    return {"": None, "0": False, "1": True}[value]


def wanted_cuda_plan() -> Plan:
    """`cuda_plan` where the CUDA library is wanted; raises `BuildSkipped` where it is not."""
    mode = build_mode()
    if mode is False:
        raise prerequisites.BuildSkipped("REFSAM_BUILD_CUDA is 0")
    if mode is None and not prerequisites.supported_torch().has_cuda:
        raise prerequisites.BuildSkipped(
            "torch has no CUDA here (REFSAM_BUILD_CUDA=1 builds it all the same)"
        )
    return cuda_plan()


def build_library(
    name: str, make: Callable[[], Plan], target: Path, *, required: bool
) -> tuple[Path | None, dict[str, object]]:
    """Builds one library into `target`; returns its path, or None, and its entry of the build report.

    Raises `BuildError` if the library is required and cannot be built.
    """
    try:
        plan = make()
        execute(plan)
    except (
        prerequisites.BuildSkipped,
        prerequisites.BuildError,
        OSError,
        subprocess.SubprocessError,
    ) as reason:
        if required:
            raise prerequisites.BuildError(
                f"{name} is required and cannot be built: {reason}"
            ) from reason
        return keep_earlier(name, target, str(reason))
    path = install(plan, target)
    print(f"refsam_kernels: {name} built with {plan.toolchain['compiler']}", flush=True)
    return path, {"built": True, **plan.toolchain}


def keep_earlier(name: str, target: Path, reason: str) -> tuple[Path | None, dict[str, object]]:
    """Keeps the earlier library if it has the same sources as the one that could not be built.

    A library of other sources may not fit the rest of the package: it is renamed, not deleted.
    """
    path, entry = target / f"{name}.so", read_report(target).get(name, {})
    if path.is_file() and entry.get("sources") == sources_hash():
        print(f"refsam_kernels: {name} not built anew, the earlier one stays: {reason}", flush=True)
        return path, entry
    print(f"refsam_kernels: {name} left out: {reason}", flush=True)
    if path.is_file():
        aside = path.with_suffix(".outdated")
        os.replace(path, aside)
        print(
            f"refsam_kernels: {path.name} was built from other sources and is now {aside}",
            flush=True,
        )
    return None, {"built": False, "reason": reason.splitlines()[0]}


def read_report(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of the build report in the folder, by library; empty if there is none that can be read."""
    try:
        return dict(json.loads((folder / REPORT).read_text()))
    except (OSError, ValueError):
        return {}


def build_all(target: Path = PACKAGE) -> list[Path]:
    """Builds every library that can be built here into the folder `target` and writes the build report beside them.

    Returns the files written. Raises `BuildError` only for a library that `REFSAM_BUILD_CUDA=1` requires.
    """
    cpu, cpu_entry = build_library("_C_cpu", cpu_plan, target, required=False)
    cuda, cuda_entry = build_library(
        "_C_cuda", wanted_cuda_plan, target, required=build_mode() is True
    )
    target.mkdir(parents=True, exist_ok=True)
    report = write_report(target, {"_C_cpu": cpu_entry, "_C_cuda": cuda_entry})
    return [*(path for path in (cpu, cuda) if path), report]


def write_report(target: Path, entries: dict[str, dict[str, object]]) -> Path:
    """Writes the report of the libraries, with their toolchains or the reasons against them, into the folder `target`."""
    report = target / REPORT
    report.write_text(json.dumps(entries, indent=2) + "\n")
    return report


def main(arguments: list[str], target: Path = PACKAGE) -> None:
    """Builds into the folder `target`, or into that of `--sanitize`; exits with one line if it cannot."""
    about = "Compiles the kernel libraries that can be built here, and says why others cannot."
    parser = argparse.ArgumentParser(prog="python -m refsam_kernels.build", description=about)
    sanitize = (
        "build the CPU library alone, with address and undefined behaviour sanitizers, into FOLDER"
    )
    parser.add_argument("--sanitize", metavar="FOLDER", type=Path, help=sanitize)
    sanitized = parser.parse_args(arguments).sanitize
    try:
        if sanitized:
            build_library("_C_cpu", lambda: cpu_plan(sanitize=True), sanitized, required=True)
        else:
            build_all(target)
    # An OSError is, for example, an installation that belongs to another user.
    except (prerequisites.BuildError, OSError) as error:
        sys.exit(f"refsam_kernels: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
