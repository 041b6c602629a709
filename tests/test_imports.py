"""Imports are those that docs/design.md draws, and importing a package costs and does nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import refsam_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"refsam": ROOT / "refsam", "refsam_kernels": ROOT / "kernels" / "refsam_kernels"}


def drawn_layers() -> dict[str, list[str]]:
    """The parts that each part may import, from the drawing in docs/design.md; parts as `cli`, `refsam_kernels`."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = text.partition("<!-- layers -->\n```\n")[2].partition("```")[0]
    rows = (line.split("->") for line in block.splitlines())
    return {part.strip(): imports.split() for part, imports in rows}


LAYERS = drawn_layers()
KERNELS_MAY_IMPORT = {"torch", "triton", "refsam_kernels"}


def modules() -> dict[str, Path]:
    """Every module of both packages, by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, also inside functions; `from a import b` gives a.b if that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def part_of(module: str) -> str | None:
    """The part of the drawing that a module belongs to; None for the package `refsam` itself and others."""
    top, _, rest = module.partition(".")
    if top == "refsam_kernels":
        return top
    return rest.partition(".")[0] or None if top == "refsam" else None


def may_import(importer: str, imported: str) -> bool:
    """Whether the drawing allows one module to import another."""
    source, target = part_of(importer), part_of(imported)
    if source is None or target is None:
        return imported != "refsam" or source in (None, "cli")
    return source == target or target in LAYERS[source]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_layers(module: str) -> None:
    if module != "refsam.__main__":
        wrong = [name for name in imports_of(MODULES[module]) if not may_import(module, name)]
        assert not wrong, f"{module} must not import {wrong} (docs/design.md, Layers)"


def test_every_module_has_a_layer() -> None:
    assert {part_of(module) for module in MODULES} - {None, "__main__"} == LAYERS.keys()


def imported_with(path: Path, seen: set[Path]) -> set[str]:
    """The packages that importing a file imports, itself or by files of this repository; `seen` are those looked at before."""
    seen.add(path)
    packages: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT.joinpath(
                "kernels" if name.startswith("refsam_kernels") else "", *name.split(".")
            )
            files = [
                file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()
            ]
            packages |= {name.partition(".")[0]} if not files and not place.is_dir() else set()
            for file in {*files} - seen:
                packages |= imported_with(file, seen)
    return packages


def test_kernels_tests_import_only_what_the_oldest_environment_has() -> None:
    listed = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    there = {line.partition("==")[0].lower().replace("_", "-") for line in listed}
    distributions = packages_distributions()
    seen: set[Path] = set()
    for path in sorted((ROOT / "tests/kernels").glob("*.py")):
        for package in (
            imported_with(path, seen)
            - sys.stdlib_module_names
            - {"refsam", "refsam_kernels", "tests", "benchmarks"}
        ):
            names = {name.lower().replace("_", "-") for name in distributions[package]}
            assert names & there, f"{path} imports {package}: import it inside the test"


def test_every_drawn_import_exists() -> None:
    found = {
        (part_of(module), part_of(name))
        for module in MODULES
        for name in imports_of(MODULES[module])
    }
    drawn = {(part, imported) for part, imports in LAYERS.items() for imported in imports}
    assert not drawn - found


def test_parts_import_downwards_only() -> None:
    rows = list(LAYERS)
    for part, imports in LAYERS.items():
        assert all(rows.index(imported) > rows.index(part) for imported in imports), part


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("refsam.cli.segment", "refsam.session", True),
        ("refsam.model.adapter", "refsam.session", False),
        ("refsam.export", "refsam.session", False),
        ("refsam.training.loop", "refsam.evaluation.scoring.masks", False),
        ("refsam.ui.jobs", "refsam.session", True),
        ("refsam.evaluation.scoring.masks", "refsam.ui.jobs", False),
        ("refsam.video.reader", "refsam.video.writer", True),
        ("refsam.video.reader", "refsam.metrics", False),
        ("refsam_kernels.core.dispatch", "refsam.config", False),
        ("refsam.model.refsam", "refsam", False),
        ("refsam.cli.info", "refsam", True),
        ("refsam.model.refsam", "torch.nn", True),
    ],
)
def test_may_import_knows_the_rules(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("refsam_kernels")))
def test_kernels_import_torch_and_triton_only(module: str) -> None:
    tops = {name.partition(".")[0] for name in imports_of(MODULES[module])}
    assert tops <= KERNELS_MAY_IMPORT | set(sys.stdlib_module_names)


def kernel_names(path: Path) -> set[str]:
    """Names that a file imports from `refsam_kernels`: those of the package itself, modules below it with their dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "refsam_kernels":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("refsam_kernels."):
            names.add(str(node.module))
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.startswith("refsam_kernels.")}
    return names


# The commands that report on the kernels themselves look further than their public functions.
REPORTS = {"refsam.cli.info": {"refsam_kernels.info"}}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("refsam.")))
def test_refsam_uses_public_kernel_functions_only(module: str) -> None:
    public = set(refsam_kernels.__all__) | REPORTS.get(module, set())
    assert kernel_names(MODULES[module]) <= public


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter; the packages are found as in this one."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ImportError(f"blocked: {{name}}")
sys.meta_path.insert(0, Blocked())
"""


def test_kernels_import_alone_and_silently(tmp_path: Path) -> None:
    blocked = {"refsam", "transformers", "torchvision", "timm", "triton"}
    names = sorted(m for m in MODULES if m.startswith("refsam_kernels.") and not is_backend(m))
    code = (
        BLOCK.format(names=blocked)
        + f"""
import importlib, refsam_kernels
for name in {names}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
assert not any("refsam_kernels" in path for path in torch.ops.loaded_libraries), "a library was loaded"
"""
    )
    result = run_python(code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def is_backend(module: str) -> bool:
    """Whether a module belongs to a backend that may need a library or a package; it is imported on first use only."""
    return bool({"triton", "cuda", "cpu"} & set(module.replace(".", "_").split("_")))


def test_refsam_import_is_light_and_silent(tmp_path: Path) -> None:
    code = """
import refsam, sys
heavy = {"torch", "numpy", "scipy", "transformers", "av", "pydantic", "PIL", "huggingface_hub", "rich", "typer"}
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
print(refsam.__version__)
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(result.stdout.split()) == 1


def test_kernels_folder_does_not_shadow_the_package_of_that_name() -> None:
    """transformers asks for a package called `kernels`; the repository's folder must not answer."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = """
from transformers import RobertaConfig, RobertaModel
RobertaModel(RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
"""
    result = run_python(code, ROOT)
    assert result.returncode == 0, result.stderr
