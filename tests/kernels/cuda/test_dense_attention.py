"""dense_attention in CUDA C++: any sizes against the reference in float64, padding, bits, checks in C++."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError, dense_attention, libraries
from tests.kernels import operator_checks as checks
from tests.kernels.emulator import DEVICE, DTYPES
from tests.kernels.interpreter import on_device
from tests.kernels.test_dense_attention import make_inputs

SIZES = {  # levels, images, pixels, channels, expressions, words
    "one-of-all": (1, 1, 1, 1, 1, 1),
    "one-image": (3, 1, 18, 20, 2, 7),
    "several-images": (2, 3, 35, 66, 3, 17),
    "several-groups-of-levels": (6, 1, 33, 224, 1, 18),
    "sixteen-rows": (2, 1, 17, 272, 1, 3),
}
operator = on_device(dense_attention)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return checks.cast(make_inputs(2, 2, 18, 16, 2, 5), torch.float16)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    checks.check_matches_reference(operator, make_inputs(*sizes), "cuda", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_most_that_it_takes(dtype: torch.dtype) -> None:
    checks.check_matches_reference(operator, make_inputs(4, 1, 33, 512, 1, 128), "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_changes_no_bit(inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    inputs = checks.cast(inputs, dtype) | {"lengths": torch.tensor([2, 3])}
    padding = torch.arange(5) >= inputs["lengths"].unsqueeze(1)
    spoiled = inputs | {"text": inputs["text"].masked_fill(padding.unsqueeze(-1), float("nan"))}
    expected, found = (operator(**values, backend="cuda") for values in (inputs, spoiled))
    assert torch.equal(found, expected)


def test_scale_and_shares_of_another_dtype(inputs: dict[str, Tensor]) -> None:
    other = {name: inputs[name].bfloat16() for name in ("scale", "level_weights")}
    exact = operator(**checks.cast(inputs | other, torch.float64), backend="reference")
    found = operator(**inputs | other, backend="cuda")
    assert found.dtype == torch.float16
    checks.assert_close("dense", found, exact, 2e-3)  # two roundings of float16


def test_repeats_bitwise(inputs: dict[str, Tensor]) -> None:
    checks.check_repeats(operator, inputs, "cuda")


def test_any_strides_and_checkpoint(inputs: dict[str, Tensor]) -> None:
    checks.check_checkpoint(operator, inputs, "cuda")
    expected, found = (
        operator(**values, backend="cuda") for values in (inputs, checks.permuted(inputs))
    )
    torch.testing.assert_close(found, expected)


def test_memory_that_is_not_aligned(inputs: dict[str, Tensor]) -> None:
    views = {
        name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        for name, x in inputs.items()
    }
    expected, found = (operator(**values, backend="cuda") for values in (inputs, views))
    assert torch.equal(found, expected)


def test_no_expressions_below_the_public_function(inputs: dict[str, Tensor]) -> None:
    inputs |= {name: inputs[name][:0] for name in ("text", "lengths", "image_index")}
    tensors = (tensor.to(DEVICE) for tensor in inputs.values())
    dense = torch.ops.refsam_kernels.dense_attention(*tensors, "cuda")
    assert dense.shape == (0, 18, 16)


def test_refuses_what_it_cannot_compute() -> None:
    for sizes, reason in (
        ((1, 1, 2, 513, 1, 1), "at most 512 channels, got 513"),
        ((1, 1, 2, 4, 1, 129), "at most 128 words, got 129"),
    ):
        inputs = checks.cast(make_inputs(*sizes), torch.float32)
        with pytest.raises(BackendError, match=reason):
            operator(**inputs, backend="cuda")
    with pytest.raises(BackendError, match=r"computes float32, .* got torch.float64"):
        operator(**make_inputs(1, 1, 2, 4, 1, 1), backend="cuda")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features", lambda x: x[0], "features: got 3 dimensions, wanted 4"),
        ("features", lambda x: x.double(), "features: got dtype Double"),
        ("features", lambda x: x.mT.contiguous().mT, "features: got strides of a view"),
        ("features", lambda x: x[:, :0], "features' images: got 0, wanted 1"),
        ("text", lambda x: x[:, :0], "text's words: got 0, wanted 1 to 128"),
        ("text", lambda x: x[..., :3], "text: got size 3 of dimension 2, wanted 16"),
        ("text", lambda x: x.float(), "text: got dtype Float, wanted Half"),
        ("folded", lambda x: x[:1], "folded: got size 1 of dimension 0, wanted 2"),
        ("lengths", lambda x: x.int(), "lengths: got dtype Int, wanted Long"),
        ("image_index", lambda x: x[:1], "image_index: got size 1 of dimension 0, wanted 2"),
        ("weight", lambda x: x[:, :16], "weight: got size 16 of dimension 1, wanted 32"),
        ("bias", lambda x: x[:3], "bias: got size 3 of dimension 0, wanted 16"),
        ("scale", lambda x: x[None], "scale: got 1 dimensions, wanted 0"),
        ("level_weights", lambda x: x[:1], "level_weights: got size 1 of dimension 0, wanted 2"),
    ],
)
def test_checks_its_arguments_in_cpp(
    inputs: dict[str, Tensor], name: str, change: Any, message: str
) -> None:
    arguments = {}
    for key, tensor in inputs.items():
        arguments[key] = tensor.to(DEVICE)
        if key == "text":
            arguments["folded"] = arguments["text"].clone()
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        libraries.load("cuda").dense_attention(*arguments.values())
