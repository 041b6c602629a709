"""A wheel holds the two packages and nothing else, with everything that they need."""

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from itertools import chain
from pathlib import Path

import pytest

import refsam

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    "refsam",
    "kernels",
    "csrc",
    "pyproject.toml",
    "setup.py",
    "build_backend.py",
    "README.md",
    "LICENSE",
    "NOTICE",
    "THIRD_PARTY_NOTICES.md",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel built from a copy of the sources: a build in the checkout could pick up leftovers of earlier ones."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
    ]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_two_packages_only(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    (metadata,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops - {metadata} == {"refsam", "refsam_kernels"}


def test_wheel_holds_every_module_and_its_data(wheel: zipfile.ZipFile) -> None:
    wanted = set()
    for folder, prefix in (
        (ROOT / "refsam", "refsam"),
        (ROOT / "kernels" / "refsam_kernels", "refsam_kernels"),
    ):
        for pattern in ("**/*.py", "py.typed", "weights/nano/*", "ui/sample/*.mp4"):
            wanted |= {f"{prefix}/{path.relative_to(folder)}" for path in folder.glob(pattern)}
    wanted |= {f"refsam_kernels/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*.*")}
    assert wanted <= set(wheel.namelist())


def test_wheel_serves_every_python_of_the_platform(wheel: zipfile.ZipFile) -> None:
    assert re.search(r"-py3-none-\w+\.whl$", str(wheel.filename))


def test_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert parser["console_scripts"]["refsam"] == "refsam.cli:main"


def test_version_stands_in_one_place(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    assert message_from_bytes(wheel.read(name))["Version"] == refsam.__version__


def test_sources_build_from_an_installed_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """`python -m refsam_kernels.build` of an installed package finds csrc inside it."""
    wheel.extractall(tmp_path)
    code = "import refsam_kernels.build as b; print(b.source_root(), *sorted(p.name for p in b.source_root().iterdir()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    folder, *names = result.stdout.split()
    assert folder == str(tmp_path / "refsam_kernels" / "csrc")
    assert {"cpu", "cuda"} <= set(names)


def constraints() -> dict[str, str]:
    """The pinned packages, by normalised name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [re.match(r"([\w.-]+)(.+)", line) for line in lines if line and not line.startswith("#")]
    return {pin[1].lower().replace("_", "-"): pin[2] for pin in pins if pin}


def test_what_the_tests_need_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w.-]+", item)[0].lower().replace("_", "-") for item in wanted}
    assert names <= set(constraints())


def test_torchvision_is_never_pulled_in() -> None:
    """Its wheels for the CPU do not load beside every torch; nothing of ours needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everything = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    assert not [item for item in everything if item.startswith("torchvision")]
    assert "torchvision" not in constraints()


@pytest.mark.parametrize("version", [None, "76.1.0"])
def test_a_build_without_isolation_names_what_it_lacks(tmp_path: Path, version: str | None) -> None:
    shutil.copy(ROOT / "build_backend.py", tmp_path)
    if version is not None:
        package = tmp_path / "setuptools"
        package.mkdir()
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
        (package / "build_meta.py").write_text("")
    command = [sys.executable, "-S", "-E", "-c", "import build_backend"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("refsam: setuptools is")
    assert "pip install 'setuptools>=77'" in line
