"""Tests of the kernels of adapter_projection that every backend must pass; a test file makes a class of them per backend."""

import torch
from torch import Tensor

from tests.kernels import operator_checks as checks
from tests.kernels.adapter_cases import AdapterCases
from tests.kernels.backend_cases import Size
from tests.kernels.test_adapter_projection import LINEAR, NORM, bare, make_inputs, operator

SIZES: dict[str, Size] = {  # leading dimensions, width, hidden width of the adapter
    "odd": ((2, 7, 9), 63, 15),
    "one-token": ((1,), 8, 2),
}
REFUSED = {
    "dtype": (((2,), 8, 2), torch.float64, "computes float32, float16, bfloat16, got float64"),
}


class AdapterProjectionCases(AdapterCases):
    small = ((2, 5), 24, 6)
    empty = ((0, 3), 8, 2)
    # As in training: everything but the adapter is frozen, and below the first one nothing is trained.
    frozen = (LINEAR + NORM, (*LINEAR, *NORM, "attention", "residual"))
    refused = REFUSED
    function = staticmethod(operator)

    def make_inputs(self, size: Size) -> dict[str, Tensor]:
        return make_inputs(*size)

    def test_matches_reference_without_adapter(self, size: Size, dtype: torch.dtype) -> None:
        inputs = bare(make_inputs(*size))
        checks.check_matches_reference(self.operator, inputs, self.backend, dtype)
