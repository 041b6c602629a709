"""mask_upscale in Triton."""

import pytest
import torch

from refsam_kernels.core.dispatch import Dispatcher
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import TritonCases
from tests.kernels.mask_upscale_cases import MaskUpscaleCases, make_inputs


class TestTriton(TritonCases, MaskUpscaleCases):
    def test_more_tiles_than_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program of the backward takes several tiles, of several expressions."""
        monkeypatch.setattr(Dispatcher.known["mask_upscale"].module("triton"), "PARTS", 2)
        inputs = make_inputs(3, 5, 4, 16, 1)
        checks.check_matches_reference(self.operator, inputs, self.backend, torch.float32)
