"""The layout for Hugging Face's Kernel Hub: what is in it, and that it works beside the installed library."""

import ast
import base64
import hashlib
import importlib.util
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import refsam_kernels
from refsam_kernels.hub import BACKENDS, NAME, main, package_files, relative, write
from tests.sam_modeling import sam_image_encoder


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    write(folder, "someone/refsam-kernels")
    return folder


def load(folder: Path, name: str) -> ModuleType:
    """A variant, as the Hub's client imports it: under a name of its own, from anywhere."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def variant(layout: Path) -> Iterator[ModuleType]:
    yield load(layout / "build" / "torch-cpu", "hub_kernel")
    for name in [name for name in sys.modules if name.partition(".")[0] == "hub_kernel"]:
        del sys.modules[name]


def test_the_configuration_is_for_a_kernel_without_compilation(layout: Path) -> None:
    config = tomllib.loads((layout / "build.toml").read_text())
    general = config["general"]
    assert (general["name"].replace("-", "_"), general["edition"]) == (NAME, 5)
    assert general["hub"]["repo-id"] == "someone/refsam-kernels"
    assert set(config["torch-noarch"]["pyext"]) == {"py", "json"}
    assert {path.name for path in (layout / "build").iterdir()} == {
        f"torch-{backend}" for backend in general["backends"]
    }
    assert (layout / "torch-ext" / NAME / "__init__.py").is_file()
    assert "someone/refsam-kernels" in (layout / "CARD.md").read_text()


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_names_every_file(layout: Path, backend: str) -> None:
    folder = layout / "build" / f"torch-{backend}"
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["id"].isidentifier()
    assert metadata["backend"]["type"] == backend
    assert metadata["python-depends"] == []  # kernels 0.17 demands it
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metadata.json"
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}


def test_imports_are_relative_or_of_torch() -> None:
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    names = {name for name, _ in package_files()}
    assert "rel_pos_attention/triton/tuned.json" in names
    assert not [name for name in names if name.endswith(("/cpu.py", "/cuda.py"))]
    for name, text in package_files():
        if name.endswith(".json"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).partition(".")[0] in allowed, name


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.py", "from refsam_kernels.b.c import d", "from .b.c import d"),
        ("a/b.py", "    from refsam_kernels.b import d", "    from ..b import d"),
        ("a/b/c.py", "from refsam_kernels import d", "from ... import d"),
        ("a.py", "from torch import Tensor", "from torch import Tensor"),
    ],
)
def test_imports_become_relative(name: str, before: str, after: str) -> None:
    assert relative(before + "\n", Path(name)) == after + "\n"


def test_two_libraries_work_side_by_side(variant: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 5, 7, 3 * 32, generator=generator, requires_grad=True)
    table = torch.randn(13, 16, generator=generator)
    results = []
    for library in (refsam_kernels, variant):
        out = library.rel_pos_attention(qkv, table, table, num_heads=2, backend="fallback")
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), qkv)))
    for installed, loaded in zip(*results, strict=True):
        assert torch.equal(installed, loaded)
    namespace = variant.core.registration.NAMESPACE
    assert namespace.startswith(f"_{NAME}_cpu_")
    assert hasattr(getattr(torch.ops, namespace), "rel_pos_attention")
    assert set(variant.__all__) == {*refsam_kernels.__all__, "integrations"}


@torch.inference_mode()
def test_its_integrations_use_its_own_operators(variant: ModuleType) -> None:
    model = sam_image_encoder(
        img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=2, out_chans=16, global_attn_indexes=(0,)
    )  # fmt: skip
    pixels = torch.randn(1, 3, 32, 32)
    wanted = model(pixels)
    variant.integrations.optimize(model)
    with torch.profiler.profile() as profile:
        found = model(pixels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    operators = {event.key for event in profile.key_averages()}
    assert f"{variant.core.registration.NAMESPACE}::rel_pos_attention" in operators
    assert "refsam_kernels::rel_pos_attention" not in operators


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "."], "--out: . exists, wanted a new folder"),
        (["--out", "new", "--repository", "mine"], "--repository: got 'mine', wanted owner/name"),
    ],
)
def test_the_command_refuses_in_words(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hub", *arguments])
    assert main() == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
