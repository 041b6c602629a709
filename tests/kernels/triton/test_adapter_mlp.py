"""adapter_mlp in Triton: results and every gradient against the reference in float64, for every combination of parts."""

import pytest
import torch

from refsam_kernels.feed_forward import mlp
from tests.kernels import operator_checks as checks
from tests.kernels.adapter_mlp_cases import SIZES, AdapterMlpCases, make_inputs
from tests.kernels.backend_cases import TritonCases


class TestTriton(TritonCases, AdapterMlpCases):
    sizes = SIZES | {"wide": ((3, 1), 2100, 16, 4)}

    def test_gelu_is_computed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As for a perceptron too large to keep its result; and nothing but the second layers trained."""
        monkeypatch.setattr(mlp, "MOST_KEPT", 0)
        case = (self.operator, make_inputs((40,), 24, 150, 6), self.backend, torch.float32)
        checks.check_matches_reference(*case)
        frozen = tuple(name for name in case[1] if not name.endswith("fc2_weight"))
        checks.check_matches_reference(*case, frozen=frozen)

    def test_more_rows_than_a_program_sums(self) -> None:
        """Partial sums of several programs, the last one not full."""
        inputs = make_inputs((70, 5), 100, 8, 3)
        checks.check_matches_reference(self.operator, inputs, self.backend, torch.float32)
