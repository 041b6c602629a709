"""adapter_projection in Triton: results and every gradient against the reference in float64."""

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError, feed_forward
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import DEVICE, DTYPES, on_device
from tests.kernels.test_adapter_projection import LINEAR, NORM, bare, make_inputs
from tests.kernels.test_adapter_projection import operator as on_any_device

SIZES = {  # leading dimensions, width, hidden width of the adapter
    "odd": ((2, 7, 9), 63, 15),
    "one-token": ((1,), 8, 2),
    "wide": ((3, 1), 2100, 4),
}
operator = on_device(on_any_device)


def small(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return checks.cast(make_inputs((2, 5), 24, 6), dtype)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "bare"])
def test_matches_reference(
    adapter: bool, dtype: torch.dtype, sizes: tuple[tuple[int, ...], int, int]
) -> None:
    inputs = make_inputs(*sizes)
    checks.check_matches_reference(operator, inputs if adapter else bare(inputs), "triton", dtype)


def test_gelu_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an adapter too large to keep its result."""
    monkeypatch.setattr(feed_forward, "MOST_KEPT", 0)
    inputs = make_inputs((40,), 24, 150)
    checks.check_matches_reference(operator, inputs, "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_untrained_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = small(dtype)
    for name in ("adapter_fc2_weight", "adapter_fc2_bias"):
        inputs[name].zero_()
    results = [operator(**values, backend="triton") for values in (inputs, bare(inputs))]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_residual_stream_of_another_dtype() -> None:
    """A float32 stream with float16 products, as under autocast."""
    inputs = small(torch.float16)
    wide = {name: inputs[name].float() for name in ("residual", *NORM)}
    (x, normed), gradients = checks.run(operator, inputs | wide, "triton")
    assert (x.dtype, normed.dtype) == (torch.float32, torch.float16)
    exact = checks.run(operator, checks.cast(inputs, torch.float64), "reference")
    for name, found, wanted in (("x", x, exact[0][0]), ("normed", normed, exact[0][1])):
        checks.assert_close(name, found, wanted, 2e-3)  # two roundings of float16
    for name, gradient in gradients.items():
        assert gradient.dtype == (inputs | wide)[name].dtype
        checks.assert_close(name, gradient, exact[1][name], 5e-3)


def test_any_strides() -> None:
    inputs = small()
    found = operator(**checks.permuted(inputs), backend="triton")
    torch.testing.assert_close(found, operator(**inputs, backend="triton"))


def test_single_gradients_and_repeats() -> None:
    checks.check_single_gradients(operator, small(), "triton")
    checks.check_repeats(operator, small(), "triton")


def test_frozen_weights_change_no_other_gradient() -> None:
    _, every = checks.run(operator, small(), "triton")
    for frozen in (LINEAR + NORM, (*LINEAR, *NORM, "attention", "residual")):
        _, found = checks.run(operator, small(), "triton", frozen=frozen)
        assert all(torch.equal(gradient, every[name]) for name, gradient in found.items())


def test_checkpoint_and_compile() -> None:
    checks.check_checkpoint(operator, small(), "triton")
    checks.check_compiles(operator, small(), "triton")


def test_empty_batch() -> None:
    inputs = checks.cast(make_inputs((0, 3), 8, 2), torch.float32)
    outputs, gradients = checks.run(operator, inputs, "triton")
    assert [tuple(output.shape) for output in outputs] == [(0, 3, 8)] * 2
    assert not any(gradient.any() for gradient in gradients.values())


def test_refuses_what_it_cannot_compute() -> None:
    inputs = {name: x.to(DEVICE) for name, x in make_inputs((2,), 8, 2).items()}
    with pytest.raises(BackendError, match="computes float32, bfloat16, float16, got float64"):
        on_any_device(**inputs, backend="triton")
