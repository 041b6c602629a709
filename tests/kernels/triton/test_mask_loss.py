"""mask_loss in Triton."""

import pytest
import torch
import torch.nn.functional as F

from refsam_kernels import BackendError
from tests.kernels.interpreter import DEVICE
from tests.kernels.mask_loss_cases import MaskLossCases


class TestTriton(MaskLossCases):
    backend = "triton"
    dtypes = (torch.float32,)
    device = DEVICE

    def test_refuses_what_it_cannot_compute(self) -> None:
        with pytest.raises(BackendError, match=r"computes float32, got torch\.float64"):
            self.operator_of()(**self.inputs(torch.float64), backend="triton")
        with pytest.raises(BackendError, match="needs resizes of at most 8 taps, these have"):
            self.check(((1, 64, 64), 4, (4, 4), (40, 40)))

    def test_sure_pixels_lose_what_they_should(self) -> None:
        """1 + exp(-15) and 1 - sigmoid(15) round away four digits of float32; nothing of it may reach the loss."""
        inputs = {"logits": torch.full((1, 4, 4), 15.0), "targets": torch.ones(1, 4, 4)}
        found = self.operator_of(((1, 4, 4), 4, (4, 4), (4, 4)))(**inputs, backend=self.backend)[0]
        logit = torch.tensor([15.0], dtype=torch.float64)
        exact = 0.25 * (1 - logit.sigmoid()).square() * F.softplus(-logit)
        torch.testing.assert_close(found.double(), exact, rtol=5e-6, atol=0)
