"""mask_upscale in Triton."""

import pytest
import torch

from refsam_kernels import BackendError, mask_upscale
from refsam_kernels.core.dispatch import Dispatcher
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import TritonCases
from tests.kernels.interpreter import DEVICE
from tests.kernels.mask_upscale_cases import MaskUpscaleCases, make_inputs


class TestTriton(TritonCases, MaskUpscaleCases):
    def test_more_tiles_than_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program of the backward takes several tiles, of several expressions."""
        monkeypatch.setattr(Dispatcher.known["mask_upscale"].module("triton"), "PARTS", 2)
        inputs = make_inputs(3, 5, 4, 16, 1)
        checks.check_matches_reference(self.operator, inputs, self.backend, torch.float32)

    @pytest.mark.parametrize("given", ["feat_s1", "feat_s0"])
    def test_leaves_features_of_higher_resolution_to_the_fallback(self, given: str) -> None:
        inputs = checks.cast(make_inputs(2, 3, 4, 16, 2), torch.float32)
        channels, times = {"feat_s1": (4, 2), "feat_s0": (2, 4)}[given]
        inputs[given] = torch.ones(1, channels, times * 3, times * 4)
        on_device = {name: each.to(DEVICE) for name, each in inputs.items()}
        reason = r"adds no features of higher resolution \(feat_s1, feat_s0\)"
        with pytest.raises(BackendError, match=reason):
            mask_upscale(**on_device, backend="triton")
        torch.testing.assert_close(
            mask_upscale(**on_device).cpu(),
            mask_upscale(**inputs, backend="reference"),
            rtol=1e-3,
            atol=1e-4,
        )
