"""adapter_mlp in CUDA C++: results, and gradients of what it saves, against the reference in float64; checks in C++."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError, libraries
from tests.kernels import operator_checks as checks
from tests.kernels.emulator import DEVICE, DTYPES
from tests.kernels.interpreter import on_device
from tests.kernels.test_adapter_mlp import ADAPTER, NORM, make_inputs, without
from tests.kernels.test_adapter_mlp import operator as on_any_device

SIZES = {  # leading dimensions, width, hidden width of the MLP and of the adapter
    "odd": ((2, 7, 9), 63, 130, 15),
    "one-token": ((1,), 8, 32, 2),
    "several-warps": ((3, 1), 776, 1100, 4),
    "widest": ((2,), 8191, 4, 1),
}
operator = on_device(on_any_device)


def small(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return checks.cast(make_inputs((2, 5), 24, 96, 6), dtype)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(
    dtype: torch.dtype, sizes: tuple[tuple[int, ...], int, int, int]
) -> None:
    checks.check_matches_reference(operator, make_inputs(*sizes), "cuda", dtype)


@pytest.mark.parametrize(
    "missing", [ADAPTER, NORM, ADAPTER + NORM], ids=["adapter", "norm", "both"]
)
def test_matches_reference_without(missing: tuple[str, ...]) -> None:
    inputs = without(make_inputs((2, 5), 24, 96, 6), *missing)
    checks.check_matches_reference(operator, inputs, "cuda", torch.float16)


def test_inference_gives_the_bits_of_training() -> None:
    for dtype in DTYPES:
        inputs = small(dtype)
        with torch.no_grad():
            found = operator(**inputs, backend="cuda")
        trained, _ = checks.run(operator, inputs, "cuda")
        assert all(torch.equal(x, y) for x, y in zip(found, trained, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untrained_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = small(dtype)
    for name in ("adapter_fc2_weight", "adapter_fc2_bias"):
        inputs[name].zero_()
    results = [operator(**values, backend="cuda") for values in (inputs, without(inputs, *ADAPTER))]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_residual_stream_of_another_dtype(dtype: torch.dtype) -> None:
    """A float32 stream with products in half precision, as under autocast."""
    inputs = small(dtype)
    wide = {name: inputs[name].float() for name in ("residual", *NORM)}
    x, normed = operator(**inputs | wide, backend="cuda")
    assert (x.dtype, normed.dtype) == (torch.float32, dtype)
    exact = operator(**checks.cast(inputs, torch.float64), backend="reference")
    for name, found, wanted in (("x", x, exact[0]), ("normed", normed, exact[1])):
        checks.assert_close(name, found, wanted, 2 * checks.TOLERANCES[dtype])


def test_any_strides() -> None:
    expected, found = (
        operator(**values, backend="cuda") for values in (small(), checks.permuted(small()))
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_memory_that_is_not_aligned() -> None:
    inputs = small(torch.float16)
    views = {name: torch.cat([x.new_zeros(1), x.flatten()])[1:] for name, x in inputs.items()}
    views = {name: view.view(inputs[name].shape) for name, view in views.items()}
    expected, found = (operator(**values, backend="cuda") for values in (inputs, views))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_repeats_bitwise_also_under_checkpointing() -> None:
    checks.check_repeats(operator, small(), "cuda")
    checks.check_checkpoint(operator, small(), "cuda")


def test_empty_batch() -> None:
    inputs = checks.cast(make_inputs((0, 3), 8, 16, 2), torch.float32)
    outputs, gradients = checks.run(operator, inputs, "cuda")
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
        on_any_device(**moved, backend="cuda")


ROWS, WIDE, LINE = (torch.zeros(*shape, device=DEVICE) for shape in ((3, 8), (3, 9), (8,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": ROWS.double()}, "residual: got dtype Double, wanted Float, Half or BFloat16"),
        ({"residual": ROWS[0, 0]}, "residual: got no dimensions, wanted (..., width)"),
        ({"residual": ROWS[:, ::2]}, "residual: got strides of a view"),
        ({"residual": torch.zeros(1, 8193, device=DEVICE)}, "last dimension: got 8193, wanted 0"),
        ({"first": WIDE}, "first: got size 9 of dimension 1, wanted 8"),
        ({"first": ROWS[None]}, "first: got 3 dimensions, wanted 2"),
        ({"first": ROWS.int()}, "first: got dtype Int"),
        ({"second": ROWS[:2]}, "second: got size 2 of dimension 0, wanted 3"),
        ({"norm_weight": ROWS}, "norm_weight: got 2 dimensions, wanted 1"),
        ({"norm_bias": None}, "norm_bias: got one of norm_weight and norm_bias"),
    ],
)
def test_add_and_norm_checks_its_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"residual": ROWS, "first": ROWS, "second": ROWS, "scale": 1.0}
    arguments |= {"norm_weight": LINE, "norm_bias": LINE, "eps": 1e-6, "keep": True} | changes
    with pytest.raises(RuntimeError, match=re.escape(message)):
        libraries.load("cuda").add_and_norm(*arguments.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS.double(), LINE, None), "hidden: got dtype Double"),
        ((ROWS[:, ::2], LINE[:4], None), "hidden: got strides of a view"),
        ((ROWS, LINE[:7], None), "bias: got size 7 of dimension 0, wanted 8"),
        ((ROWS, LINE, ROWS[:2]), "activated: got size 2 of dimension 0, wanted 3"),
        ((ROWS, LINE, ROWS.half()), "activated: got dtype Half, wanted Float"),
    ],
)
def test_bias_gelu_checks_its_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        libraries.load("cuda").bias_gelu_(*arguments)
