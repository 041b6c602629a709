"""dense_attention: the formula, the absorbed form, gradients, its place among torch's tools.

Tests of all backends are in `dense_attention_cases`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import dense_attention
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import TorchCases
from tests.kernels.dense_attention_cases import SIZES, DenseAttentionCases, make_inputs

MANY_EXPRESSIONS = (2, 3, 35, 16, 7, 9)


class TestReference(TorchCases, DenseAttentionCases):
    backend = "reference"
    sizes = SIZES | {"many-expressions": MANY_EXPRESSIONS}
    small = MANY_EXPRESSIONS


class TestFallback(TestReference):
    backend = "fallback"


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs(*MANY_EXPRESSIONS)


def test_reference_is_the_formula_of_one_pixel(inputs: dict[str, Tensor]) -> None:
    """Written out for one expression and one pixel, without any batching."""
    expression, pixel = 4, 11
    image, length = inputs["image_index"][expression], inputs["lengths"][expression]
    words = inputs["text"][expression, :length]
    expected = torch.zeros(16, dtype=torch.float64)
    for level, share in zip(inputs["features"], inputs["level_weights"], strict=True):
        own = level[image, pixel]
        attention = torch.softmax(words @ own * inputs["scale"], dim=0)
        both = torch.cat([own, attention @ words])
        expected += share * (inputs["weight"] @ both + inputs["bias"])
    result = dense_attention(**inputs, backend="reference")
    torch.testing.assert_close(result[expression, pixel], expected)


def test_chunks_change_nothing(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, gradients = checks.run(dense_attention, inputs, "fallback")
    monkeypatch.setattr("refsam_kernels.core.chunking.ELEMENTS_ON_CPU", 3 * 35 * 16)
    found, found_gradients = checks.run(dense_attention, inputs, "fallback")
    torch.testing.assert_close(found, outputs)
    torch.testing.assert_close(found_gradients, gradients)


def test_reference_gradients_are_the_derivatives() -> None:
    inputs = make_inputs(2, 2, 3, 4, 3, 3)
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]

    def function(*tensors: Tensor) -> Tensor:
        changed = dict(zip(names, tensors, strict=True))
        return dense_attention(**(inputs | changed), backend="reference")

    values = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "fallback"])
def test_opcheck(backend: str) -> None:
    inputs = checks.cast(make_inputs(2, 2, 5, 4, 3, 3), torch.float32)
    operator = torch.ops.refsam_kernels.dense_attention.default
    checks.check_schema_and_fakes(operator, (*inputs.values(), backend))


def test_second_derivative(inputs: dict[str, Tensor]) -> None:
    checks.check_second_derivative_raises(dense_attention, inputs, "weight")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"features": torch.zeros(3, 35, 16)}, r"features: got shape \(3, 35, 16\), wanted \(L, B, N, C\)"),
    "no-expressions": ({"text": torch.zeros(0, 9, 16).double()}, "text: got no expressions, wanted at least one"),
    "no-words": ({"text": torch.zeros(7, 0, 16).double()}, "text: got no words, wanted at least one per expression"),
    "channels": ({"text": torch.zeros(7, 9, 15).double()}, r"text: got shape \(7, 9, 15\), wanted \(P, T, 16\)"),
    "no-pixels": ({"features": torch.zeros(2, 3, 0, 16).double()}, "features: got shape .*wanted no empty dimension"),
    "dtype": ({"weight": torch.zeros(16, 32)}, "weight: got torch.float32, wanted torch.float64 as features"),
    "lengths-dtype": ({"lengths": torch.ones(7)}, "lengths: got torch.float32, wanted torch.int64"),
    "length-0": ({"lengths": torch.zeros(7).long()}, "lengths: got values from 0 to 0, wanted values from 1 to 9"),
    "length-10": ({"lengths": torch.full((7,), 10)}, "lengths: got values from 10 to 10, wanted values from 1 to 9"),
    "image": ({"image_index": torch.full((7,), 3)}, "image_index: got values from 3 to 3, wanted values from 0 to 2"),
    "scale": ({"scale": torch.ones(1)}, r"scale: got shape \(1,\), wanted \(\)"),
    "levels": ({"level_weights": torch.ones(3)}, r"level_weights: got shape \(3,\), wanted \(2\)"),
    "integer-levels": ({"level_weights": torch.ones(2).long()}, "level_weights: got torch.int64, wanted a floating"),
    "device": ({"bias": torch.zeros(16, device="meta").double()}, "bias: got meta, wanted cpu as features"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(inputs: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_attention(**(inputs | change))
