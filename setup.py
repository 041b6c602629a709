"""Compiles the kernel libraries during installation. Everything else is in pyproject.toml.

torch is never imported here: `refsam_kernels.build` finds its headers by path, so that the libraries are built
under build isolation too, and an installation without torch, a compiler or nvcc succeeds all the same.
"""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "kernels" / "refsam_kernels"


def load_build_module() -> ModuleType:
    """`refsam_kernels.build` by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("refsam_kernels_build", PACKAGE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibraries(build_ext):
    """Builds the libraries with `refsam_kernels.build`, which has no Python extension among them."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.built: list[str] = []

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = PACKAGE if in_place else Path(self.build_lib) / "refsam_kernels"
        self.built = [str(path) for path in load_build_module().build_all(target)]

    def get_outputs(self) -> list[str]:
        return self.built

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPythonAndSources(build_py):
    """Puts csrc/ into the wheel as data, so that `python -m refsam_kernels.build` works from an installed wheel."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            sources = Path(self.build_lib) / "refsam_kernels" / "csrc"
            shutil.copytree(ROOT / "csrc", sources, dirs_exist_ok=True)


class StableWheel(bdist_wheel):
    """The libraries use torch's stable ABI and no Python symbol: one wheel serves every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """A distribution that runs build_ext although it lists no Python extension."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=PlatformDistribution,
    cmdclass={
        "build_ext": BuildLibraries,
        "build_py": BuildPythonAndSources,
        "bdist_wheel": StableWheel,
    },
)
