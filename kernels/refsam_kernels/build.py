"""Compiles the kernel libraries: `setup.py` runs this during installation, `python -m refsam_kernels.build` later.

Nothing here imports torch: its headers and libraries are found by path, and the libraries use its stable ABI (torch's
documentation, "LibTorch Stable ABI"), so one file serves every torch from 2.10 on and every Python. Two libraries come out,
`_C_cpu.so` and `_C_cuda.so`; they are separate because the CUDA one cannot be loaded by a torch without CUDA.

`REFSAM_BUILD_CUDA` 1 requires the CUDA library, 0 forbids it, unset builds it where torch has CUDA and nvcc is found.
`TORCH_CUDA_ARCH_LIST`, `CUDA_HOME` and `CXX` are honoured. ninja and ccache are used if present.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
REPORT = "_build.json"
OLDEST_TORCH = (2, 10)
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, as torch/csrc/stable/version.h spells it
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512".split()
# Of sources in csrc/cpu whose name ends so, on x86-64: the library asks the processor before it calls them.
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": AVX512,
    "_avx512bf16": [*AVX512, "-mavx512bf16"],
}


# Put before a compiler in CXX; nvcc wants the compiler itself.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


class BuildError(RuntimeError):
    """A library that was asked for by name could not be built."""


class BuildSkipped(Exception):
    """Why a library is not built here, in one line."""


@dataclass(frozen=True)
class Torch:
    """The torch of the target environment, found without importing it."""

    root: Path
    version: str
    has_cuda: bool
    cuda_version: str = ""  # "13.0", or "" without CUDA


@dataclass(frozen=True)
class Step:
    """One command of a build: `command` makes `output` from `inputs`; a compiler lists headers in `depfile`."""

    output: Path
    inputs: tuple[Path, ...]
    command: tuple[str, ...]
    depfile: Path | None = None

    @property
    def log(self) -> Path:
        """Where the command's messages go, kept so that an unchanged object still has them."""
        return self.output.with_suffix(".log")

    @property
    def shell_line(self) -> str:
        """The command for a POSIX shell, messages to the log, which is shown if it fails."""
        log = shlex.quote(str(self.log))
        return f"{shlex.join(self.command)} > {log} 2>&1 || {{ cat {log}; exit 1; }}"


@dataclass(frozen=True)
class Plan:
    """How one library is built: objects in any order, then the link."""

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


def find_torch() -> Torch | None:
    """The torch of the target environment, or None; pip's build isolation hides it from imports, not from the disk."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    roots += [folder / "torch" for folder in package_folders()]
    for root in roots:
        if (root / "version.py").is_file() and (root / "include").is_dir():
            text = (root / "version.py").read_text()
            version = re.search(r"__version__ = '([^']+)'", text)
            cuda = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.MULTILINE)
            has_cuda = any((root / "lib").glob("libtorch_cuda.*"))
            return Torch(root, version[1] if version else "0", has_cuda, cuda[1] if cuda else "")
    return None


def package_folders() -> list[Path]:
    """Where the target environment has its packages, in the order of its search path, whatever build isolation hides."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    text = settings.read_text() if settings.is_file() else ""
    if not text or re.search(r"include-system-site-packages\s*=\s*true", text, re.IGNORECASE):
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return [Path(folder) for folder in folders]


def supported_torch() -> Torch:
    """The installed torch if a library can be built against it; raises `BuildSkipped` otherwise."""
    torch = find_torch()
    if torch is None:
        raise BuildSkipped(
            "torch is not installed in this environment: install it, then run python -m refsam_kernels.build"
        )
    release = tuple(int(part) for part in re.findall(r"\d+", torch.version)[:2])
    if release < OLDEST_TORCH:
        raise BuildSkipped(f"torch is {torch.version}, the stable ABI needs 2.10 or newer")
    return torch


def source_root() -> Path:
    """The folder csrc: inside an installed package, or beside `kernels/` in a checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "csrc"


def build_root() -> Path:
    """Where objects are kept between builds: in the checkout, or in the user's cache for an installed package."""
    if not (PACKAGE / "csrc").is_dir():
        return PACKAGE.parents[1] / "build" / "kernels"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "refsam_kernels"


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command; `CXX` may have a launcher before it and arguments behind it, as "ccache g++ -m64".

    Raises `BuildSkipped` if there is none or the platform is not built for.
    """
    if not sys.platform.startswith("linux"):
        raise BuildSkipped(f"libraries are built on Linux only, this is {sys.platform}")
    wanted = os.environ.get("CXX", "").strip()
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        path = shutil.which(name)  # also one whose path has spaces
        if path and not is_launcher(path):
            return (path,)
    words = shlex.split(wanted)
    paths = [word if word.startswith("-") else shutil.which(word) for word in words]
    if not words or None in paths or is_launcher(words[-1]):
        raise BuildSkipped(f"no C++ compiler found (looked for {wanted or 'c++, g++, clang++'})")
    return tuple(path for path in paths if path)


def is_launcher(word: str) -> bool:
    """Whether a word of a command runs a compiler and is none."""
    return Path(word).name in LAUNCHERS


def find_nvcc() -> str:
    """nvcc of `CUDA_HOME`, of the search path or of /usr/local/cuda; raises `BuildSkipped` if there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [
        *(str(Path(home, "bin", "nvcc")) for home in homes),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    raise BuildSkipped("no nvcc found (looked in CUDA_HOME, the search path and /usr/local/cuda)")


def first_line(command: list[str]) -> str:
    """The first line that a command prints, for the build report."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (result.stdout or result.stderr).splitlines()
    return lines[0] if lines else ""


def architectures(nvcc: str) -> list[str]:
    """Compute capabilities to compile for, such as "9.0" or "12.0+PTX".

    `TORCH_CUDA_ARCH_LIST` is taken as it is; the default list loses what this nvcc does not know.
    """
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        chosen = re.split(r"[\s;,]+", wanted.strip())
        for name in chosen:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST: got {name!r}, wanted entries such as 9.0, 9.0a or 12.0+PTX"
                )
        return chosen
    listed = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    known = [name for name in DEFAULT_ARCHITECTURES if f"sm_{digits(name)}" in listed]
    if not known:
        raise BuildSkipped(
            f"nvcc knows none of the architectures {', '.join(DEFAULT_ARCHITECTURES)}"
        )
    if not known[-1].endswith("+PTX"):
        known[-1] += "+PTX"
    return known


def digits(architecture: str) -> str:
    """ "12.0+PTX" -> "120", as nvcc writes it."""
    return architecture.removesuffix("+PTX").replace(".", "")


def gencode(names: Iterable[str]) -> list[str]:
    """nvcc's arguments for a list of compute capabilities."""
    arguments = []
    for name in names:
        number = digits(name)
        arguments.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            arguments.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return arguments


def cpu_plan(sanitize: bool = False) -> Plan:
    """How `_C_cpu.so` is built here; raises `BuildSkipped` with the reason if it cannot be.

    With `sanitize` it stops the process at the first bad address or undefined operation.
    """
    torch, compiler = supported_torch(), find_compiler()
    flags = "-O3 -fPIC -fvisibility=hidden -Wall -Wextra".split()
    objects = build_root() / "_C_cpu"
    if sanitize:
        flags += "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all".split()
        objects = build_root() / "_C_cpu_sanitized"
    toolchain = {"compiler": first_line([*compiler, "--version"]), "torch": torch.version}
    return make_plan("_C_cpu", compiler, flags, objects, sources_of("cpu"), toolchain)


def cuda_plan() -> Plan:
    """How `_C_cuda.so` is built here; raises `BuildSkipped` with the reason if it cannot be."""
    torch, nvcc = supported_torch(), find_nvcc()
    compiler, *options = (word for word in find_compiler() if not is_launcher(word))
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    refuse_other_cuda(version, torch)
    names = architectures(nvcc)
    # USE_CUDA: without it torch's headers hide the current stream when torch itself has no CUDA.
    flags = "-O3 -lineinfo -DUSE_CUDA -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden,-Wall".split()
    flags += [f"-ccbin={compiler}", *(f"-Xcompiler={option}" for option in options)]
    flags += gencode(names)
    toolchain = {
        "compiler": version.splitlines()[-1],
        "torch": torch.version,
        "architectures": " ".join(names),
    }
    objects = build_root() / "_C_cuda"
    return make_plan("_C_cuda", (nvcc,), flags, objects, sources_of("cuda"), toolchain)


def refuse_other_cuda(nvcc_version: str, torch: Torch) -> None:
    """Raises `BuildSkipped` if nvcc is of another major release than torch's CUDA: its programs want another driver."""
    release = re.search(r"release (\d+\.\d+)", nvcc_version)
    if not release or not torch.cuda_version:
        return
    if release[1].split(".")[0] != torch.cuda_version.split(".")[0]:
        raise BuildSkipped(
            f"nvcc is of CUDA {release[1]}, torch {torch.version} of CUDA {torch.cuda_version}: "
            "install its toolkit, and name it by CUDA_HOME"
        )


def sources_of(folder: str) -> list[Path]:
    """The sources of `csrc/<folder>`."""
    files = (source_root() / folder).iterdir()
    return sorted(path for path in files if path.suffix in (".cpp", ".cu"))


def sources_hash() -> str:
    """What a library is made of, in one word."""
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
    torch, own_flags = supported_torch(), own_flags or instruction_set
    ccache = None if is_launcher(compiler[0]) else shutil.which("ccache")
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
        raise BuildError(f"compiling failed:\n{result.stdout}")


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
    """Registers and spills of every kernel and architecture, from what ptxas printed when the objects were made."""
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
        raise BuildError(f"REFSAM_BUILD_CUDA: got {value!r}, wanted 0, 1 or nothing")
    return {"": None, "0": False, "1": True}[value]


def wanted_cuda_plan() -> Plan:
    """`cuda_plan` where the CUDA library is wanted; raises `BuildSkipped` where it is not."""
    mode = build_mode()
    if mode is False:
        raise BuildSkipped("REFSAM_BUILD_CUDA is 0")
    if mode is None and not supported_torch().has_cuda:
        raise BuildSkipped("torch has no CUDA here (REFSAM_BUILD_CUDA=1 builds it all the same)")
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
    except (BuildSkipped, BuildError, OSError, subprocess.SubprocessError) as reason:
        if required:
            raise BuildError(f"{name} is required and cannot be built: {reason}") from reason
        return keep_earlier(name, target, str(reason))
    path = install(plan, target)
    print(f"refsam_kernels: {name} built with {plan.toolchain['compiler']}", flush=True)
    return path, {"built": True, **plan.toolchain}


def keep_earlier(name: str, target: Path, reason: str) -> tuple[Path | None, dict[str, object]]:
    """What there is of a library that could not be built: the one of the same sources, if there is one.

    One of other sources may not fit the rest of the package: it is set aside, not deleted.
    """
    path, entry = target / f"{name}.so", report_entry(target, name)
    if path.is_file() and entry.get("sources") == sources_hash():
        print(f"refsam_kernels: {name} not built anew, the earlier one stays: {reason}", flush=True)
        return path, entry
    print(f"refsam_kernels: {name} left out: {reason}", flush=True)
    if path.is_file():
        aside = path.with_suffix(".outdated")
        os.replace(path, aside)
        print(f"refsam_kernels: {path.name} is of other sources, and is now {aside}", flush=True)
    return None, {"built": False, "reason": reason.splitlines()[0]}


def report_entry(target: Path, name: str) -> dict[str, object]:
    """What the folder's report says of a library; nothing if there is none."""
    try:
        return dict(json.loads((target / REPORT).read_text())[name])
    except (OSError, ValueError, KeyError):
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
    """Writes what was built, with what, or why not, beside the libraries in the folder `target`."""
    report = target / REPORT
    report.write_text(json.dumps(entries, indent=2) + "\n")
    return report


def build_sanitized(target: Path) -> None:
    """Builds the CPU library with address and undefined behaviour sanitizers into the folder `target`.

    `make sanitize` runs the compiled backends' tests on it.
    """
    build_library("_C_cpu", lambda: cpu_plan(sanitize=True), target, required=True)


def main(arguments: list[str], target: Path = PACKAGE) -> None:
    """Builds into the folder `target`, or, after `--sanitize`, into the one that is named; exits with one line if it cannot."""
    try:
        if arguments[:1] == ["--sanitize"]:
            build_sanitized(Path(arguments[1]))
        else:
            build_all(target)
    except (BuildError, OSError) as error:  # such as an installation that belongs to somebody else
        sys.exit(f"refsam_kernels: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
