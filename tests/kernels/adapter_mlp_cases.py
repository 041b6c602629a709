"""Tests of the kernels of adapter_mlp that every backend must pass; a test file makes a class of them per backend."""

import pytest
import torch
from torch import Tensor

from tests.kernels import operator_checks as checks
from tests.kernels.adapter_cases import AdapterCases
from tests.kernels.backend_cases import Size
from tests.kernels.test_adapter_mlp import ADAPTER, MLP, NORM, make_inputs, operator, without

SIZES: dict[str, Size] = {  # leading dimensions, width, hidden width of the MLP and of the adapter
    "odd": ((2, 7, 9), 63, 130, 15),
    "one-token": ((1,), 8, 32, 2),
}
REFUSED = {
    "dtype": (
        ((2,), 8, 16, 2),
        torch.float64,
        "computes float32, float16, bfloat16, got float64",
    ),
    "width": (
        ((1,), 8200, 1, 1),
        torch.float32,
        "takes at most 8192 channels in a row, got 8200",
    ),
}


class AdapterMlpCases(AdapterCases):
    small = ((2, 5), 24, 96, 6)
    empty = ((0, 3), 8, 16, 2)
    frozen = (MLP + NORM,)
    refused = REFUSED
    function = staticmethod(operator)

    def make_inputs(self, size: Size) -> dict[str, Tensor]:
        return make_inputs(*size)

    @pytest.mark.parametrize(
        "missing", [ADAPTER, NORM, ADAPTER + NORM], ids=["adapter", "norm", "both"]
    )
    def test_matches_reference_without(self, missing: tuple[str, ...], dtype: torch.dtype) -> None:
        inputs = without(make_inputs(*self.small), *missing)
        checks.check_matches_reference(self.operator, inputs, self.backend, dtype)
