"""dense_attention: the folded form against the formula, padding, gradients, and its place among torch's tools."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels import dense_attention
from tests.kernels import operator_checks as checks

BACKENDS = ["reference", "fallback"]
SIZES = {  # levels, images, pixels, channels, expressions, words
    "one-of-all": (1, 1, 1, 1, 1, 1),
    "one-image": (3, 1, 63, 20, 5, 7),
    "several-images": (2, 3, 35, 16, 7, 9),
    "more-images-than-expressions": (4, 5, 13, 8, 2, 3),
}


def make_inputs(
    levels: int, images: int, pixels: int, channels: int, expressions: int, words: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(42)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "features": F.normalize(normal(levels, images, pixels, channels), dim=-1),
        "text": F.normalize(normal(expressions, words, channels), dim=-1),
        "lengths": torch.randint(1, words + 1, (expressions,), generator=generator),
        "image_index": torch.randint(images, (expressions,), generator=generator),
        "weight": normal(channels, 2 * channels) / channels**0.5,
        "bias": normal(channels),
        "scale": torch.tensor(7.0, dtype=torch.float64),
        "level_weights": 1.3 * normal(levels).softmax(dim=0),  # the operator takes any
    }


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs(*SIZES["several-images"])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    checks.check_matches_reference(dense_attention, make_inputs(*sizes), backend, dtype)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_no_bit(inputs: dict[str, Tensor], backend: str) -> None:
    padding = torch.arange(9) >= inputs["lengths"].unsqueeze(1)
    outputs, gradients = checks.run(dense_attention, inputs, backend)
    poisoned = {**inputs, "text": inputs["text"].masked_fill(padding.unsqueeze(-1), float("nan"))}
    found, found_gradients = checks.run(dense_attention, poisoned, backend)
    assert torch.equal(found[0], outputs[0])
    assert all(torch.equal(found_gradients[name], gradients[name]) for name in gradients)
    assert not found_gradients["text"][padding].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expression_does_not_depend_on_the_others(inputs: dict[str, Tensor], backend: str) -> None:
    together = dense_attention(**inputs, backend=backend)
    for i in range(7):
        own = {name: inputs[name][i : i + 1] for name in ("text", "lengths", "image_index")}
        alone = dense_attention(**(inputs | own), backend=backend)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-12)


def test_chunks_change_nothing(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, gradients = checks.run(dense_attention, inputs, "fallback")
    monkeypatch.setattr("refsam_kernels.chunks.ELEMENTS_ON_CPU", 3 * 35 * 16)
    found, found_gradients = checks.run(dense_attention, inputs, "fallback")
    torch.testing.assert_close(found, outputs)
    torch.testing.assert_close(found_gradients, gradients)


def test_fallback_leaves_out_gradients_that_are_not_wanted(inputs: dict[str, Tensor]) -> None:
    checks.check_single_gradients(dense_attention, inputs, "fallback")


def test_reference_gradients_are_the_derivatives() -> None:
    inputs = make_inputs(2, 2, 3, 4, 3, 3)
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]

    def function(*tensors: Tensor) -> Tensor:
        changed = dict(zip(names, tensors, strict=True))
        return dense_attention(**(inputs | changed), backend="reference")

    values = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(inputs: dict[str, Tensor], backend: str) -> None:
    checks.check_repeats(dense_attention, checks.cast(inputs, torch.float32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = checks.cast(make_inputs(2, 2, 5, 4, 3, 3), torch.float32)
    operator = torch.ops.refsam_kernels.dense_attention.default
    checks.check_schema_and_fakes(operator, (*inputs.values(), backend))


def test_compiles_into_one_graph(inputs: dict[str, Tensor]) -> None:
    checks.check_compiles(dense_attention, inputs, "fallback")


def test_checkpoint_and_second_derivative(inputs: dict[str, Tensor]) -> None:
    checks.check_checkpoint(dense_attention, inputs, "fallback")
    checks.check_second_derivative_raises(dense_attention, inputs, "weight")


def test_autocast_lowers_the_products(inputs: dict[str, Tensor]) -> None:
    inputs = checks.cast(inputs, torch.float32)
    full = dense_attention(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = dense_attention(**inputs)
    assert lowered.dtype == torch.bfloat16
    checks.assert_close("autocast", lowered, full.double(), 4e-2)


def test_no_expressions_below_the_public_function(inputs: dict[str, Tensor]) -> None:
    """The operator itself takes an empty batch: a compiled graph may meet one."""
    names = ("text", "lengths", "image_index")
    inputs = inputs | {name: inputs[name][:0] for name in names}
    for backend in BACKENDS:
        dense = torch.ops.refsam_kernels.dense_attention(*inputs.values(), backend)
        assert dense.shape == (0, 35, 16)


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
