"""Tests that every backend of mask_loss must pass; a test file makes a class of them per backend."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import mask_loss
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import on_device

Size = tuple[tuple[int, int, int], int, tuple[int, int], tuple[int, int]]
SIZES: dict[
    str, Size
] = {  # logits, image_size, input_size, targets; the last tiles of Triton's kernels are cut
    "odd": ((2, 20, 18), 80, (50, 80), (37, 51)),
    "portrait": ((1, 17, 33), 64, (64, 43), (40, 150)),
    "shrinking": ((2, 33, 27), 70, (70, 9), (5, 3)),
    "one-pixel": ((1, 1, 1), 1, (1, 1), (1, 1)),
}
SMALL: Size = ((2, 8, 8), 32, (32, 20), (9, 11))
# For losses against the reference in float64, and for gradients beside three times the plain formula's error.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6}


def make_inputs(logits: tuple[int, ...], targets: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(42)
    shape = (logits[0], *targets)
    return {
        "logits": 6 * torch.randn(logits, generator=generator, dtype=torch.float64),
        "targets": torch.rand(shape, generator=generator, dtype=torch.float64),
        "ignore": torch.rand(shape, generator=generator) > 0.7,
    }


class MaskLossCases:
    """Needs the name of the backend, and what it computes in."""

    backend: str
    dtypes: tuple[torch.dtype, ...]
    device = "cpu"

    def operator_of(self, size: Size = SMALL, **settings: Any) -> checks.Operator:
        """The operator as a function of its tensors."""
        sizes = {"image_size": size[1], "input_size": size[2]}
        return on_device(partial(mask_loss, **sizes, **settings), self.device)

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Soft targets and ignored pixels."""
        return checks.cast(make_inputs(SMALL[0], SMALL[3]), dtype)

    def run(self, inputs: checks.Inputs) -> Any:
        return checks.run(self.operator_of(), inputs, self.backend, ("targets",))

    def check(self, size: Size, **settings: Any) -> None:
        """Losses and gradient against the reference in float64."""
        operator, frozen = self.operator_of(size, **settings), ("targets",)
        for dtype in self.dtypes:
            inputs = checks.cast(make_inputs(size[0], size[3]), dtype)
            found, gradients = checks.run(operator, inputs, self.backend, frozen)
            double = checks.cast(inputs, torch.float64)
            exact, wanted = checks.run(operator, double, "reference", frozen)
            _, eager = checks.run(operator, inputs, "reference", frozen)
            for got, value in zip(found, exact, strict=True):
                torch.testing.assert_close(got.double(), value, rtol=TOLERANCES[dtype], atol=0)
            gradient, exact_one, eager_one = (x["logits"] for x in (gradients, wanted, eager))
            largest = exact_one.abs().max().clamp(min=1e-12)
            rounding = ((eager_one - exact_one).abs().max() / largest).item()
            tolerance = TOLERANCES[dtype] + 3 * rounding
            checks.assert_close("gradient", gradient, exact_one, tolerance)

    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
    def test_matches_reference(self, size: Size) -> None:
        self.check(size)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.3])
    def test_any_exponent(self, gamma: float) -> None:
        self.check(SMALL, gamma=gamma, alpha=0.4)

    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.uint8, torch.float16, torch.float64], ids=str
    )
    def test_targets_of_every_dtype_are_the_same(self, dtype: torch.dtype) -> None:
        inputs = self.inputs()
        inputs["targets"] = (inputs["targets"] > 0.5).float()
        outputs, _ = self.run(inputs)
        inputs["targets"] = inputs["targets"].to(dtype)
        found, _ = self.run(inputs)
        assert all(map(torch.equal, found, outputs))

    @pytest.mark.parametrize("layout", checks.LAYOUTS.values(), ids=checks.LAYOUTS)
    def test_any_layout(self, layout: Callable[[Tensor], Tensor]) -> None:
        operator, inputs = self.operator_of(), self.inputs()
        checks.check_layout(operator, inputs, self.backend, layout, ("targets",))

    def test_forward_mode_raises(self) -> None:
        checks.check_forward_mode_raises(self.operator_of(), self.inputs(), self.backend)

    def test_ignored_pixels_change_no_bit(self) -> None:
        """Any values there, NaN included, change nothing; the gradient is that of the other pixels alone."""
        inputs = self.inputs()
        outputs, gradients = self.run(inputs)
        for rubbish in (255.0, float("nan")):
            targets = inputs["targets"].masked_fill(inputs["ignore"], rubbish)
            found, found_gradients = self.run(inputs | {"targets": targets})
            assert all(map(torch.equal, found, outputs))
            assert torch.equal(found_gradients["logits"], gradients["logits"])

    def test_ignored_rows_are_as_if_absent(self) -> None:
        """Where nothing is resized, ignoring the lower rows gives the loss of the upper ones alone."""
        inputs = checks.cast(make_inputs((2, 12, 12), (12, 12)), torch.float32)
        inputs["ignore"] = torch.arange(12).view(12, 1).expand(2, 12, 12) >= 7
        found = self.operator_of(((2, 12, 12), 12, (12, 12), (12, 12)))
        upper = self.operator_of(((2, 12, 12), 12, (7, 12), (7, 12)))
        values = {"logits": inputs["logits"], "targets": inputs["targets"][:, :7]}
        torch.testing.assert_close(
            found(**inputs, backend=self.backend), upper(**values, backend=self.backend)
        )

    def test_everything_ignored(self) -> None:
        inputs = self.inputs()
        outputs, gradients = self.run(inputs | {"ignore": torch.ones_like(inputs["ignore"])})
        assert not any(x.any() for x in (*outputs, gradients["logits"]))

    def test_extreme_logits_stay_finite(self) -> None:
        """Sure and right: no loss, no gradient. Sure and wrong: a focal loss that grows with the logit."""
        inside = torch.tensor([True, False]).view(2, 1, 1).expand(2, 4, 4)
        right = torch.where(inside, 200.0, -200.0)
        for sign in (1, -1):
            outputs, gradients = self.run({"logits": sign * right, "targets": inside})
            assert all(torch.isfinite(x).all() for x in (*outputs, gradients["logits"]))
            expected = torch.zeros(2) if sign == 1 else torch.tensor([0.25 * 200, 0.75 * 200])
            torch.testing.assert_close(outputs[0], expected)

    def test_repeats_bitwise(self) -> None:
        inputs = checks.cast(make_inputs((2, 17, 8), (9, 33)), torch.float32)
        inputs["targets"] = inputs["targets"] > 0.5
        checks.check_repeats(self.operator_of(), inputs, self.backend)

    def test_checkpoint_and_compile(self) -> None:
        inputs = self.inputs()
        inputs["targets"] = inputs["targets"] > 0.5
        checks.check_checkpoint(self.operator_of(), inputs, self.backend)
        inputs = {name: x[:, :1, :1] for name, x in inputs.items()}
        checks.check_compiles(self.operator_of(), inputs, self.backend)

    def test_no_masks_below_the_public_function(self) -> None:
        """The operator itself takes an empty batch: a compiled graph may meet one."""
        tensors = (x[:0].to(self.device) for x in self.inputs().values())
        outputs = torch.ops.refsam_kernels.mask_loss(
            *tensors, SMALL[1], SMALL[2], 0.25, 2.0, self.backend
        )
        assert [tuple(x.shape) for x in outputs] == [(0,), (0,), (4, 0)]
