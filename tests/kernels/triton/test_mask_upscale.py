"""mask_upscale in Triton: logits and every gradient against the reference in float64."""

import pytest
import torch

from refsam_kernels import BackendError, mask_upscale
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import DEVICE, DTYPES, on_device
from tests.kernels.test_mask_upscale import make_inputs

SIZES = {  # expressions, height, width, channels, masks
    "one-pixel": (1, 1, 1, 24, 1),
    "odd": (2, 5, 9, 40, 3),
}
operator = on_device(mask_upscale)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    checks.check_matches_reference(operator, make_inputs(*sizes), "triton", dtype)


def test_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the backward takes several tiles, of several expressions."""
    from refsam_kernels.dispatch import Dispatcher

    monkeypatch.setattr(Dispatcher.known["mask_upscale"].module("triton"), "PARTS", 2)
    checks.check_matches_reference(operator, make_inputs(3, 5, 4, 16, 1), "triton", torch.float32)


def test_any_strides_and_norm_dtype() -> None:
    inputs = checks.cast(make_inputs(2, 3, 4, 16, 2), torch.float16)
    inputs |= {name: inputs[name].float() for name in ("norm_weight", "norm_bias")}
    found = operator(**checks.permuted(inputs), backend="triton")
    assert torch.equal(found, operator(**inputs, backend="triton"))


def test_gradients_that_are_not_wanted_are_left_out() -> None:
    inputs = checks.cast(make_inputs(1, 1, 2, 16, 1), torch.float32)
    _, together = checks.run(operator, inputs, "triton")
    for name in ("features", "conv2_bias"):
        frozen = tuple(other for other in inputs if other != name)
        _, alone = checks.run(operator, inputs, "triton", frozen)
        assert torch.equal(alone[name], together[name])


def test_repeats_bitwise() -> None:
    inputs = checks.cast(make_inputs(2, 3, 7, 16, 2), torch.float32)
    checks.check_repeats(operator, inputs, "triton")


def test_checkpoint_and_compile() -> None:
    inputs = checks.cast(make_inputs(1, 2, 1, 16, 1), torch.float32)
    checks.check_checkpoint(operator, inputs, "triton")
    checks.check_compiles(operator, inputs, "triton")


def test_refuses_what_it_cannot_compute() -> None:
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(1, 1, 1, 16, 1).items()}
    with pytest.raises(
        BackendError, match=r"computes float32, bfloat16, float16, got torch\.float64"
    ):
        mask_upscale(**inputs, backend="triton")
    inputs = checks.cast(make_inputs(1, 1, 1, 520, 1), torch.float32)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    with pytest.raises(
        BackendError, match=r"at most \(128, 64\) channels in the middle, got \(130, 65\)"
    ):
        mask_upscale(**inputs, backend="triton")
