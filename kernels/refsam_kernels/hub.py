"""`python -m refsam_kernels.hub --out FOLDER`: this library as a kernel of Hugging Face's Kernel Hub.

The folder holds the sources of their `kernel-builder` (`build.toml`, `torch-ext/`), and beside it the variants
that need no build, in `build/`: the library without its compiled backends is Python, Triton and JSON. There all imports
are relative and the operators' namespace is unique, so that several versions can be loaded side by side.

Follows huggingface.co/docs/kernels: "Kernel requirements" and "Writing kernels", build format edition 5.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from refsam_kernels.build import PACKAGE

NAME = "refsam_kernels"
VERSION = 0  # By the Hub's convention: the interface may still change.
BACKENDS = ("cuda", "cpu")
CUDA_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
LICENSE = "Apache-2.0"
# Files that need a compiled library, and this command.
_LEFT_OUT = {"cpu.py", "cuda.py", "cuda_steps.py", "hub.py"}
_IMPORT = re.compile(r"^(\s*)from refsam_kernels(\.[\w.]+)? import ", re.MULTILINE)
_NAMESPACE = re.compile(r'^NAMESPACE = "refsam_kernels"$', re.MULTILINE)

_OPS = '''"""The namespace of this build's operators."""

import torch

_NAME = "{name}"
ops = getattr(torch.ops, _NAME)


def add_op_namespace_prefix(op_name):
    """The operator's name with its namespace."""
    return f"{{_NAME}}::{{op_name}}"
'''

_COMPATIBILITY = '''"""The same names one folder deeper, where older versions of `kernels` look."""

from .. import *  # noqa: F403
from .. import __all__  # noqa: F401
'''

_FLAKE = """{
  description = "refsam_kernels";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

_CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# refsam_kernels

Operators for SAM's image encoder and mask decoder: attention with decomposed relative positions, forward and backward, windowed
and global; adapters; dense and two-way attention; mask upscaling, loss and post-processing. In Triton for GPUs, in plain
PyTorch for any device; Python 3.11 and torch 2.10 or newer. The Triton kernels are compiled ahead of time for each of the
architectures and checked in Triton's interpreter; no GPU has run them yet.

```python
import torch
from kernels import get_kernel

kernels = get_kernel("REPOSITORY", version=VERSION, trust_remote_code=True)
qkv = torch.randn(1, 64, 64, 3 * 768)
table = torch.randn(127, 64)
out = kernels.rel_pos_attention(qkv, table, table, num_heads=12)      # (1, 64, 64, 768)
handle = kernels.integrations.optimize(sam)                           # segment-anything's, transformers' or timm's SAM
```
"""

_TEST = '''"""One operator against its formula."""

import pytest
import refsam_kernels
import torch


@pytest.mark.kernels_ci
def test_rel_pos_attention_matches_reference() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv, table = torch.randn(1, 8, 8, 96, device=device), torch.randn(15, 16, device=device)
    found = refsam_kernels.rel_pos_attention(qkv, table, table, num_heads=2)
    wanted = refsam_kernels.rel_pos_attention(qkv, table, table, num_heads=2, backend="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2 if device == "cuda" else 1e-5)
'''


def write(out: Path, repository: str) -> None:
    """Writes the folder, under its name only when it is complete.

    Raises `ValueError` if `out` exists or `repository` is not `owner/name`.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--repository: got {repository!r}, wanted owner/name")
    if out.exists():
        raise ValueError(f"--out: {out} exists, wanted a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_sources(staging, repository)
        for backend in BACKENDS:
            _write_variant(staging / "build" / f"torch-{backend}", backend)
        staging.chmod(0o755)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_sources(folder: Path, repository: str) -> None:
    """The sources of `kernel-builder`, which adds `_ops.py` itself."""
    _write_text(folder / "build.toml", build_toml(repository))
    card = _CARD.replace("REPOSITORY", repository).replace("VERSION", str(VERSION))
    _write_text(folder / "CARD.md", card)
    _write_text(folder / "flake.nix", _FLAKE)
    _write_text(folder / "tests" / f"test_{NAME}.py", _TEST)
    for name, text in package_files():
        _write_text(folder / "torch-ext" / NAME / name, text)


def _write_variant(folder: Path, backend: str) -> None:
    """One variant as it lies on the Hub, with its metadata."""
    files = dict(package_files())
    digest = hashlib.sha1(json.dumps(files, sort_keys=True).encode()).hexdigest()[:7]
    identifier = f"_{NAME}_{backend}_{digest}"
    files["_ops.py"] = _OPS.format(name=identifier)
    files[f"{NAME}/__init__.py"] = _COMPATIBILITY
    for name, text in files.items():
        _write_text(folder / name, text)
    metadata = {
        "name": NAME.replace("_", "-"),
        "id": identifier,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend}
        | ({"archs": list(CUDA_CAPABILITIES)} if backend == "cuda" else {}),
        "digest": {
            "algorithm": "sha256",
            "files": {name: _sha256(text) for name, text in sorted(files.items())},
        },
    }
    _write_text(folder / "metadata.json", json.dumps(metadata, indent=2) + "\n")


def build_toml(repository: str) -> str:
    """The configuration of `kernel-builder`."""

    def listed(values: Sequence[str]) -> str:
        return ", ".join(f'"{value}"' for value in values)

    return f"""[general]
name = "{NAME.replace("_", "-")}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = [{listed(BACKENDS)}]

[general.hub]
repo-id = "{repository}"

[torch-noarch]
pyext = ["py", "json"]
cuda_capabilities = [{listed(CUDA_CAPABILITIES)}]
"""


def package_files() -> Iterator[tuple[str, str]]:
    """Names relative to the package and texts of its files, as they are in the variants."""
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.json")]):
        if path.name in _LEFT_OUT or path.name.startswith("_build"):
            continue
        name = path.relative_to(PACKAGE)
        text = path.read_text(encoding="utf-8")
        yield name.as_posix(), relative(text, name) if path.suffix == ".py" else text


def relative(text: str, name: Path) -> str:
    """A module's text with relative imports and, where it registers operators, the build's own namespace."""
    dots = "." * len(name.parts)
    text = _IMPORT.sub(lambda match: f"{match[1]}from {dots}{(match[2] or '.')[1:]} import ", text)
    if name == Path("core/registration.py"):
        text, count = _NAMESPACE.subn(
            'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")', text
        )
        if count != 1:
            raise RuntimeError("core/registration.py: its namespace was not found")
        text = text.replace(
            "from ..core.dispatch import",
            "from .._ops import add_op_namespace_prefix\nfrom ..core.dispatch import",
            1,
        )
    if name == Path("__init__.py"):
        text = text.replace(
            "\n__all__ = [\n",
            '\nfrom . import integrations\n\n__all__ = [\n    "integrations",\n',
            1,
        )
    return text


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main() -> int:
    """Writes the folder and says where; returns 2 on wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m refsam_kernels.hub", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--repository", default="refsam/refsam-kernels", help="owner/name on the Hub"
    )
    options = parser.parse_args()
    try:
        write(options.out, options.repository)
    except (ValueError, OSError) as error:
        print(f"refsam_kernels.hub: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
