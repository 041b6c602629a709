"""Compiles the kernel libraries during installation. Everything else is in pyproject.toml.

torch is never imported here: `refsam_kernels.prerequisites` finds its headers by path, so that the libraries are built
under build isolation too, and an installation without torch, a compiler or nvcc succeeds all the same.
"""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "kernels" / "refsam_kernels"


def load_by_path(name: str) -> ModuleType:
    """A module of `refsam_kernels` by its path: importing the package would import torch."""
    path = PACKAGE / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"refsam_kernels_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics_extension() -> list[Extension]:
    """The module `refsam.metrics._native` if pybind11's headers are there: in its package, or among those of torch."""
    folders = []
    if importlib.util.find_spec("pybind11"):
        import pybind11

        folders.append(Path(pybind11.get_include()))
    torch = load_by_path("prerequisites").find_torch()
    if torch is not None:
        folders.append(torch.root / "include")
    include = [str(folder) for folder in folders if (folder / "pybind11" / "numpy.h").is_file()]
    if not include:
        return []
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-pthread", "-g0"]
    sources = sorted((ROOT / "csrc" / "metrics").glob("*.cpp"))
    return [
        Extension(
            "refsam.metrics._native",
            [str(path.relative_to(ROOT)) for path in sources],
            depends=[str(path) for path in (ROOT / "csrc" / "metrics").glob("*.h")],
            include_dirs=include[:1],
            extra_compile_args=["/O2", "/std:c++20"] if sys.platform == "win32" else flags,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
            language="c++",
            optional=True,  # refsam.metrics has the same in Python
        )
    ]


class BuildLibraries(build_ext):
    """Builds the kernel libraries with `refsam_kernels.build`, and the metrics' Python extension as usual."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.built: list[str] = []

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = PACKAGE if in_place else Path(self.build_lib) / "refsam_kernels"
        self.built = [str(path) for path in load_by_path("build").build_all(target)]
        if not self.extensions:
            print(
                "refsam.metrics: native J and F left out: no headers of pybind11 found", flush=True
            )
        super().run()

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *self.built]


class BuildPythonAndSources(build_py):
    """Puts csrc/ into the wheel as data, so that `python -m refsam_kernels.build` works from an installed wheel."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            sources = Path(self.build_lib) / "refsam_kernels" / "csrc"
            shutil.copytree(ROOT / "csrc", sources, dirs_exist_ok=True)


class StableWheel(bdist_wheel):
    """The kernel libraries use torch's stable ABI and no Python symbol: one wheel serves every Python of a platform.

    The native metrics are for the Python that built the wheel; any other one passes over their file, by its name.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """A distribution that runs build_ext although it may list no Python extension."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=PlatformDistribution,
    ext_modules=metrics_extension(),
    cmdclass={
        "build_ext": BuildLibraries,
        "build_py": BuildPythonAndSources,
        "bdist_wheel": StableWheel,
    },
)
