"""The golden outputs of the original modules, which lie outside the repository, and their weights."""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

VARIABLE = "REFSAM_GOLDEN_DIR"
MATRIX_WORDS = ("rel_pos", "pos_embed", "gaussian", "token")


def golden_folder() -> Path:
    """Where the files are: REFSAM_GOLDEN_DIR, else `shared/golden` beside the checkout; skips without them."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = Path(os.environ.get(VARIABLE, beside))
    if not folder.is_dir():
        pytest.skip(f"golden files: no folder {folder}; set {VARIABLE}")
    return folder


def read_golden(name: str) -> dict[str, Tensor]:
    """All arrays of one file."""
    with np.load(golden_folder() / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def golden_weight(name: str, shape: tuple[int, ...], *, calm: bool = False) -> Tensor:
    """The parameter that the golden files' README makes from a name and a shape, float32.

    calm: fill matrices by the rule's last line even where the name holds one of its words (`calm_*` of EVF-SAM).
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(shape).astype(np.float32)
    is_embedding = "embed" in name and name.endswith("weight") and len(shape) == 2
    if len(shape) <= 1:
        values = 1 + np.float32(0.1) * values if name.endswith("weight") else 0.1 * values
    elif not calm and (is_embedding or any(word in name for word in MATRIX_WORDS)):
        values = np.float32(0.3) * values
    else:
        values = values / np.sqrt(values[0].size)
    return torch.from_numpy(values.astype(np.float32))


def golden_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`golden_weight` of every entry."""
    return {name: golden_weight(name, tuple(shape)) for name, shape in shapes.items()}


def relative_error(found: Tensor, golden: Tensor) -> float:
    """max|found - golden| / max|golden|."""
    assert found.shape == golden.shape
    return float((found - golden).abs().max() / golden.abs().max())
