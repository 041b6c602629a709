"""adapter_mlp in CUDA C++: results, and gradients of what it saves, against the reference in float64; checks in C++."""

import re
from typing import Any

import pytest
import torch

from refsam_kernels.core import libraries
from tests.kernels.adapter_mlp_cases import SIZES, AdapterMlpCases
from tests.kernels.backend_cases import CudaCases
from tests.kernels.emulator import DEVICE


class TestCuda(CudaCases, AdapterMlpCases):
    sizes = SIZES | {"several-warps": ((3, 1), 776, 1100, 4), "widest": ((2,), 8191, 4, 1)}


ROWS, WIDE, LINE = (torch.zeros(*shape, device=DEVICE) for shape in ((3, 8), (3, 9), (8,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": ROWS.double()}, "residual: got dtype Double, wanted Float, Half or BFloat16"),
        ({"residual": ROWS[0, 0]}, "residual: got no dimensions, wanted (..., width)"),
        ({"residual": ROWS[:, ::2]}, "residual: got strides of a view"),
        ({"residual": torch.zeros(1, 8193, device=DEVICE)}, "last dimension: got 8193, wanted 0"),
        ({"first": WIDE}, "first: got size 9 of dimension 1, wanted 8"),
        ({"first": ROWS[None]}, "first: got 3 dimensions, wanted 2"),
        ({"first": ROWS.int()}, "first: got dtype Int"),
        ({"second": ROWS[:2]}, "second: got size 2 of dimension 0, wanted 3"),
        ({"norm_weight": ROWS}, "norm_weight: got 2 dimensions, wanted 1"),
        ({"norm_bias": None}, "norm_bias: got one of norm_weight and norm_bias"),
    ],
)
def test_add_and_norm_checks_its_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"residual": ROWS, "first": ROWS, "second": ROWS, "scale": 1.0}
    arguments |= {"norm_weight": LINE, "norm_bias": LINE, "eps": 1e-6, "keep": True} | changes
    with pytest.raises(RuntimeError, match=re.escape(message)):
        libraries.load("cuda").add_and_norm(*arguments.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS.double(), LINE, None), "hidden: got dtype Double"),
        ((ROWS[:, ::2], LINE[:4], None), "hidden: got strides of a view"),
        ((ROWS, LINE[:7], None), "bias: got size 7 of dimension 0, wanted 8"),
        ((ROWS, LINE, ROWS[:2]), "activated: got size 2 of dimension 0, wanted 3"),
        ((ROWS, LINE, ROWS.half()), "activated: got dtype Half, wanted Float"),
    ],
)
def test_bias_gelu_checks_its_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        libraries.load("cuda").bias_gelu_(*arguments)
