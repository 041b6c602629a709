"""The torch, the compiler and the nvcc that the kernel libraries are built with, found without importing torch.

`refsam_kernels.build` and `setup.py` load this file by its path too, so it imports nothing but Python's own modules.
"""

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
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
    """Package folders of the target environment in the order of its search path, also under build isolation."""
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


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command; `CXX` may have a launcher before it and arguments behind it, as "ccache g++ -m64".

    Raises `BuildSkipped` if there is none, or on a platform without libraries.
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
    """Whether a word of a command is a program that runs a compiler, such as ccache."""
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
