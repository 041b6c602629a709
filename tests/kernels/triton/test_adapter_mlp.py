"""adapter_mlp in Triton: results and every gradient against the reference in float64, for every combination of parts."""

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError, feed_forward
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import DEVICE, DTYPES, on_device
from tests.kernels.test_adapter_mlp import ADAPTER, MLP, NORM, make_inputs, without
from tests.kernels.test_adapter_mlp import operator as on_any_device

SIZES = {  # leading dimensions, width, hidden width of the MLP and of the adapter
    "odd": ((2, 7, 9), 63, 130, 15),
    "one-token": ((1,), 8, 32, 2),
    "wide": ((3, 1), 2100, 16, 4),
}
operator = on_device(on_any_device)


def small(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return checks.cast(make_inputs((2, 5), 24, 96, 6), dtype)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(
    dtype: torch.dtype, sizes: tuple[tuple[int, ...], int, int, int]
) -> None:
    checks.check_matches_reference(operator, make_inputs(*sizes), "triton", dtype)


@pytest.mark.parametrize(
    "missing", [ADAPTER, NORM, ADAPTER + NORM], ids=["adapter", "norm", "both"]
)
def test_matches_reference_without(missing: tuple[str, ...]) -> None:
    inputs = without(make_inputs((2, 5), 24, 96, 6), *missing)
    checks.check_matches_reference(operator, inputs, "triton", torch.float32)


def test_gelu_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a perceptron too large to keep its result; and nothing but the second layers trained."""
    monkeypatch.setattr(feed_forward, "MOST_KEPT", 0)
    inputs = make_inputs((40,), 24, 150, 6)
    checks.check_matches_reference(operator, inputs, "triton", torch.float32)
    frozen = tuple(name for name in inputs if not name.endswith("fc2_weight"))
    checks.check_matches_reference(operator, inputs, "triton", torch.float32, frozen=frozen)


def test_more_rows_than_a_program_sums() -> None:
    """Partial sums of several programs, the last one not full."""
    inputs = make_inputs((70, 5), 100, 8, 3)
    checks.check_matches_reference(operator, inputs, "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_untrained_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = small(dtype)
    for name in ("adapter_fc2_weight", "adapter_fc2_bias"):
        inputs[name].zero_()
    results = [
        operator(**values, backend="triton") for values in (inputs, without(inputs, *ADAPTER))
    ]
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
    expected = checks.run(operator, inputs, "triton")
    found = checks.run(operator, checks.permuted(inputs), "triton")
    for got, wanted in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(got, wanted)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_single_gradients_and_repeats() -> None:
    checks.check_single_gradients(operator, small(), "triton")
    checks.check_repeats(operator, small(), "triton")


def test_frozen_weights_change_no_other_gradient() -> None:
    _, every = checks.run(operator, small(), "triton")
    _, found = checks.run(operator, small(), "triton", frozen=MLP + NORM)
    assert all(torch.equal(gradient, every[name]) for name, gradient in found.items())


def test_checkpoint_and_compile() -> None:
    checks.check_checkpoint(operator, small(), "triton")
    checks.check_compiles(operator, small(), "triton")


def test_empty_batch() -> None:
    inputs = checks.cast(make_inputs((0, 3), 8, 16, 2), torch.float32)
    outputs, gradients = checks.run(operator, inputs, "triton")
    assert [tuple(output.shape) for output in outputs] == [(0, 3, 8)] * 2
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (make_inputs((2,), 8, 16, 2), "computes float32, bfloat16, float16, got float64"),
        (
            checks.cast(make_inputs((1,), 8200, 1, 1), torch.float32),
            "takes rows of at most 8192 channels, got 8200",
        ),
    ],
    ids=["dtype", "width"],
)
def test_refuses_what_it_cannot_compute(values: dict[str, Tensor], message: str) -> None:
    moved = {name: x.to(DEVICE) for name, x in values.items()}
    with pytest.raises(BackendError, match=message):
        on_any_device(**moved, backend="triton")
