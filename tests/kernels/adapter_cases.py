"""Tests that every backend of adapter_mlp and adapter_projection must pass: tokens, adapter, residual stream, norm."""

import torch

from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import BackendCases, Size
from tests.kernels.test_adapter_mlp import ADAPTER, NORM, without


class AdapterCases(BackendCases):
    empty: Size  # of shape (0, 3, 8)

    def test_untrained_adapter_changes_no_bit(self, dtype: torch.dtype) -> None:
        inputs = self.inputs(dtype)
        for name in ("adapter_fc2_weight", "adapter_fc2_bias"):
            inputs[name].zero_()
        both = (inputs, without(inputs, *ADAPTER))
        results = [self.operator(**values, backend=self.backend) for values in both]
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def test_residual_stream_of_another_dtype(self, half: torch.dtype) -> None:
        """A float32 stream with products in half precision, as under autocast."""
        inputs = self.inputs(half)
        mixed = inputs | {name: inputs[name].float() for name in ("residual", *NORM)}
        (x, normed), gradients = self.run(mixed)
        assert (x.dtype, normed.dtype) == (torch.float32, half)
        exact = checks.run(self.operator, checks.cast(inputs, torch.float64), "reference")
        rounding = checks.TOLERANCES[half]
        for name, found, wanted in (("x", x, exact[0][0]), ("normed", normed, exact[0][1])):
            checks.assert_close(name, found, wanted, 2 * rounding)
        for name, gradient in gradients.items():
            assert gradient.dtype == mixed[name].dtype
            checks.assert_close(name, gradient, exact[1][name], 5 * rounding)

    def test_empty_batch(self) -> None:
        outputs, gradients = self.run(checks.cast(self.make_inputs(self.empty), torch.float32))
        assert [tuple(output.shape) for output in outputs] == [(0, 3, 8)] * 2
        assert not any(gradient.any() for gradient in gradients.values())
