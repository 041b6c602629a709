"""Tests that every backend of mask_upscale must pass; a test file makes a class of them per backend."""

from functools import partial

import torch
from torch import Tensor

from refsam_kernels import mask_upscale
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import BackendCases, Size
from tests.kernels.interpreter import on_device

SIZES: dict[str, Size] = {  # expressions, height, width, channels, masks
    "one-pixel": (1, 1, 1, 24, 1),
    "odd": (2, 5, 9, 40, 3),
    "one-mask": (2, 9, 1, 16, 1),
}
REFUSED = {
    "dtype": (
        SIZES["one-pixel"],
        torch.float64,
        "computes float32, float16, bfloat16, got float64",
    ),
    "channels": (
        (1, 1, 1, 520, 1),
        torch.float32,
        "at most 128 channels after the first convolution, got 130; takes at most 64 channels",
    ),
}
NORM = ("norm_weight", "norm_bias")


def make_inputs(
    expressions: int, height: int, width: int, channels: int, masks: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(42)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    middle, last = channels // 4, channels // 8
    return {
        "features": normal(expressions, height, width, channels),
        "hyper": normal(expressions, masks, last),
        "conv1_weight": normal(channels, middle, 2, 2) / channels**0.5,
        "conv1_bias": normal(middle),
        "norm_weight": normal(middle),
        "norm_bias": normal(middle),
        "conv2_weight": normal(middle, last, 2, 2) / middle**0.5,
        "conv2_bias": normal(last),
    }


class MaskUpscaleCases(BackendCases):
    sizes = SIZES
    small = (2, 1, 2, 16, 2)
    frozen = (("features", *NORM),)
    refused = REFUSED
    function = staticmethod(mask_upscale)

    def make_inputs(self, size: Size) -> dict[str, Tensor]:
        return make_inputs(*size)

    def test_eps_stands_within_the_root(self) -> None:
        """With equal channels the variance is 0 and only eps is left."""
        inputs = self.inputs()
        inputs["conv1_weight"].zero_()
        inputs["conv1_bias"].fill_(3.0)
        inputs["conv1_bias"][0] += 1e-3
        of_large = on_device(partial(mask_upscale, eps=1.0), self.device)
        small = self.operator(**inputs, backend=self.backend)
        large = of_large(**inputs, backend=self.backend)
        assert not torch.allclose(small, large, atol=1e-2)
        torch.testing.assert_close(large, of_large(**inputs, backend="reference"))

    def test_one_mask_is_that_of_all(self, dtype: torch.dtype) -> None:
        inputs = self.inputs(dtype)
        together = self.operator(**inputs, backend=self.backend)
        one = inputs | {"hyper": inputs["hyper"][:, 1:2]}
        alone = self.operator(**one, backend=self.backend)
        checks.assert_close("mask", alone, together[:, 1:2].double(), checks.TOLERANCES[dtype])

    def test_norm_of_another_dtype(self, half: torch.dtype) -> None:
        inputs = self.inputs(half)
        inputs |= {name: inputs[name].float() for name in NORM}
        exact = self.operator(**checks.cast(inputs, torch.float64), backend="reference")
        found = self.operator(**inputs, backend=self.backend)
        assert found.dtype == half
        checks.assert_close("masks", found, exact, 2 * checks.TOLERANCES[half])

    def test_autocast_lowers_the_products(self, half: torch.dtype) -> None:
        full = self.operator(**self.inputs(), backend=self.backend)
        with torch.autocast(self.device, dtype=half):
            lowered = self.operator(**self.inputs(), backend=self.backend)
        assert lowered.dtype == half
        checks.assert_close("autocast", lowered, full.double(), 6 * checks.TOLERANCES[half])

    def test_no_expressions_below_the_public_function(self) -> None:
        """The operator itself takes an empty batch: a compiled graph may meet one."""
        inputs = self.inputs()
        _, height, width, _ = inputs["features"].shape
        inputs |= {name: inputs[name][:0] for name in ("features", "hyper")}
        tensors = (tensor.to(self.device) for tensor in inputs.values())
        arguments = (*tensors, None, None, 1e-6, self.backend)
        masks = torch.ops.refsam_kernels.mask_upscale(*arguments)
        assert masks.shape == (0, inputs["hyper"].shape[1], 4 * height, 4 * width)
