"""Every public function and class is documented and typed; one operator has one name wherever it appears."""

import ast
from pathlib import Path

import pytest

import refsam
import refsam_kernels

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "refsam_kernels"
FILES = sorted([*(ROOT / "refsam").rglob("*.py"), *KERNELS.rglob("*.py")])
OPERATORS = sorted(path.parent.name for path in KERNELS.glob("*/op.py"))

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(tree: ast.Module) -> list[Definition]:
    """The functions and classes of a file's top level whose name has no leading underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


def untyped(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's parameters without a type, and "return" if it does not say what it returns."""
    arguments = function.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    missing = [
        a.arg
        for a in every
        if a is not None and a.annotation is None and a.arg not in ("self", "cls")
    ]
    return missing + (["return"] if function.returns is None else [])


def is_triton(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it: its arguments are pointers, tiles and numbers, which Python cannot type."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_definitions_are_documented_and_typed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    definitions = public_definitions(tree)
    if definitions:
        assert ast.get_docstring(tree), "the file says nothing about itself"
    undocumented = [d.name for d in definitions if not ast.get_docstring(d)]
    assert not undocumented
    functions = [d for d in definitions if not isinstance(d, ast.ClassDef) and not is_triton(d)]
    assert not {f.name: untyped(f) for f in functions if untyped(f)}


def test_undocumented_code_would_be_found() -> None:
    tree = ast.parse("def shown(a, b: int): ...\ndef _hidden(): ...\nclass Shown: ...")
    assert [d.name for d in public_definitions(tree)] == ["shown", "Shown"]
    assert untyped(tree.body[0]) == ["a", "return"]
    assert not is_triton(tree.body[0])
    assert is_triton(ast.parse("@triton.jit\ndef tile(x): ...").body[0])


@pytest.mark.parametrize("package", [refsam, refsam_kernels], ids=lambda package: package.__name__)
def test_public_names_exist(package: object) -> None:
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert not missing


def test_renamed_kernel_names_still_work() -> None:
    with pytest.warns(DeprecationWarning, match="packs is now refsam_kernels.can_prepack"):
        assert refsam_kernels.packs is refsam_kernels.can_prepack


def test_there_are_operators() -> None:
    assert "mask_postprocess" in OPERATORS


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_has_one_stem(operator: str) -> None:
    folder = KERNELS / operator
    companions = [
        folder / name for name in ("README.md", "reference.py", "fallback.py", "__init__.py")
    ]
    companions.append(ROOT / "tests" / "kernels" / f"test_{operator}.py")
    missing = [str(path.relative_to(ROOT)) for path in companions if not path.is_file()]
    assert not missing
    assert callable(getattr(refsam_kernels, operator))
    assert operator in refsam_kernels.__all__


# Both are made of the same two steps.
SHARED_SOURCES = dict.fromkeys(["adapter_mlp", "adapter_projection"], "feed_forward")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("library", ["cpu", "cuda"])
def test_compiled_backend_has_its_sources(operator: str, library: str) -> None:
    """A backend module, its header, its registration and its kernel stand or fall together.

    The kernel is one file, or one for each instruction set.
    """
    folder = ROOT / "csrc" / library
    suffix = "cpp" if library == "cpu" else "cu"
    stem = SHARED_SOURCES.get(operator, operator)
    kernels = {path.name for path in folder.glob(f"{stem}*.{suffix}")} - {f"{stem}_op.cpp"}
    present = [(folder / name).is_file() for name in (f"{stem}.h", f"{stem}_op.cpp")]
    assert [*present, bool(kernels)] == [(KERNELS / operator / f"{library}.py").is_file()] * 3
