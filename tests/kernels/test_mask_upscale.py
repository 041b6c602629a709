"""mask_upscale: equal to segment-anything's decoder, gradients, and its place among torch's tools.

Tests of all backends are in `mask_upscale_cases`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import mask_upscale
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import Size, TorchCases
from tests.kernels.mask_upscale_cases import SIZES, MaskUpscaleCases, make_inputs
from tests.sam_modeling import load_sam_modeling, randomise

BACKENDS = ["reference", "fallback"]
MANY_MASKS = (3, 5, 7, 24, 4)


class TestReference(TorchCases, MaskUpscaleCases):
    backend = "reference"
    sizes = SIZES | {"many-masks": MANY_MASKS}
    small = MANY_MASKS


class TestFallback(TestReference):
    backend = "fallback"


def with_added(
    expressions: int, height: int, width: int, channels: int, masks: int
) -> dict[str, Tensor]:
    """The inputs with features of higher resolution; those of the first convolution are shared by all expressions."""
    inputs = make_inputs(expressions, height, width, channels, masks)
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shared = normal(1, channels // 4, 2 * height, 2 * width)
    own = normal(expressions, channels // 8, 4 * height, 4 * width)
    return inputs | {"feat_s1": shared, "feat_s0": own}


class OfSam2(MaskUpscaleCases):
    """With what SAM 2 adds behind both convolutions."""

    def make_inputs(self, size: Size) -> dict[str, Tensor]:
        return with_added(*size)

    def test_no_expressions_below_the_public_function(self) -> None:
        """As without: features of higher resolution change nothing there."""


class TestReferenceOfSam2(TorchCases, OfSam2):
    backend = "reference"
    small = MANY_MASKS


class TestFallbackOfSam2(TestReferenceOfSam2):
    backend = "fallback"


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs(*MANY_MASKS)


@pytest.mark.parametrize("expressions", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_segment_anything(backend: str, expressions: int) -> None:
    """`output_upscaling` and the product with the hypernetworks' outputs, as in `MaskDecoder.predict_masks`."""
    decoder = load_sam_modeling().mask_decoder.MaskDecoder
    upscaling = randomise(decoder(transformer_dim=64, transformer=None).output_upscaling)
    torch.manual_seed(1)
    tokens, hyper = torch.randn(expressions, 54, 64), torch.randn(expressions, 4, 8)
    conv1, norm, _, conv2, _ = upscaling
    with torch.no_grad():
        upscaled = upscaling(tokens.transpose(1, 2).view(expressions, 64, 6, 9))
        wanted = (hyper @ upscaled.flatten(2)).view(expressions, 4, 24, 36)
        parameters = [x for layer in (conv1, norm, conv2) for x in (layer.weight, layer.bias)]
        features = tokens.view(expressions, 6, 9, 64)
        found = mask_upscale(features, hyper, *parameters, eps=norm.eps, backend=backend)
    if backend == "reference":
        assert torch.equal(found, wanted)
    else:
        checks.assert_close("masks", found, wanted.double(), 1e-5)


@pytest.mark.parametrize("make", [make_inputs, with_added])
def test_chunks_change_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(*MANY_MASKS)
    outputs, gradients = checks.run(mask_upscale, inputs, "fallback")
    monkeypatch.setattr("refsam_kernels.core.chunking.ELEMENTS_ON_CPU", 2 * 16 * 5 * 7 * 3)
    found, found_gradients = checks.run(mask_upscale, inputs, "fallback")
    torch.testing.assert_close(found, outputs)
    torch.testing.assert_close(found_gradients, gradients)


def test_reference_gradients_are_the_derivatives() -> None:
    values = [tensor.requires_grad_() for tensor in with_added(2, 2, 1, 8, 2).values()]

    def function(*tensors: Tensor) -> Tensor:
        *others, feat_s1, feat_s0 = tensors
        return mask_upscale(*others, feat_s1=feat_s1, feat_s0=feat_s0, backend="reference")

    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = checks.cast(make_inputs(2, 2, 3, 8, 2), torch.float32)
    operator = torch.ops.refsam_kernels.mask_upscale.default
    checks.check_schema_and_fakes(operator, (*inputs.values(), None, None, 1e-6, backend))
    added = checks.cast(with_added(2, 2, 3, 8, 2), torch.float32)
    checks.check_schema_and_fakes(operator, (*added.values(), 1e-6, backend))


def test_second_derivative(inputs: dict[str, Tensor]) -> None:
    checks.check_second_derivative_raises(mask_upscale, inputs, "features")


def double(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"features": double(3, 24, 35)}, r"features: got shape \(3, 24, 35\), wanted \(P, h, w, C\)"),
    "no-expressions": ({"features": double(0, 5, 7, 24)}, "features: got no expressions, wanted at least one"),
    "no-pixels": ({"features": double(3, 0, 7, 24)}, "features: got shape .*, wanted no empty dimension"),
    "no-masks": ({"hyper": double(3, 0, 3)}, "hyper: got no masks, wanted at least one"),
    "hyper": ({"hyper": double(3, 4, 4)}, r"hyper: got shape \(3, 4, 4\), wanted \(3, M, 3\)"),
    "kernel": ({"conv1_weight": double(24, 6, 3, 3)}, r"conv1_weight: got .*, wanted \(24, C/4, 2, 2\)"),
    "middle": ({"conv2_weight": double(5, 3, 2, 2)}, r"conv2_weight: got .*, wanted \(6, C/8, 2, 2\)"),
    "norm": ({"norm_weight": double(5)}, r"norm_weight: got shape \(5,\), wanted \(6\)"),
    "dtype": ({"hyper": torch.zeros(3, 4, 3)}, "hyper: got torch.float32, wanted torch.float64 as features"),
    "norm-dtype": ({"norm_bias": torch.zeros(6).long()}, "norm_bias: got torch.int64, wanted a floating point dtype"),
    "feat_s1": ({"feat_s1": double(2, 6, 10, 14)}, r"feat_s1: got shape .*, wanted \(3, 6, 10, 14\)"),
    "feat_s0": ({"feat_s0": double(1, 3, 10, 14)}, r"feat_s0: got shape .*, wanted \(1, 3, 20, 28\)"),
    "device": ({"conv2_bias": double(3).to("meta")}, "conv2_bias: got meta, wanted cpu as features"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(inputs: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_upscale(**(inputs | change))
