"""adapter_projection in Triton: results and every gradient against the reference in float64."""

import pytest
import torch

from refsam_kernels.feed_forward import mlp
from tests.kernels import operator_checks as checks
from tests.kernels.adapter_projection_cases import SIZES, AdapterProjectionCases, make_inputs
from tests.kernels.backend_cases import TritonCases


class TestTriton(TritonCases, AdapterProjectionCases):
    sizes = SIZES | {"wide": ((3, 1), 2100, 4)}

    def test_gelu_is_computed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As for an adapter too large to keep its result."""
        monkeypatch.setattr(mlp, "MOST_KEPT", 0)
        inputs = make_inputs((40,), 24, 150)
        checks.check_matches_reference(self.operator, inputs, self.backend, torch.float32)
