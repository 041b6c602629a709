"""optimize() beside the real torchao and peft, where they are: `pip install --no-deps torchao peft accelerate psutil`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels.integrations import optimize
from tests.kernels.test_integrations import (
    assert_close,
    each_encoder,
    features,
    pixels_of,
    sam,
    sam_encoder,
)

Wrap = Callable[[nn.Module], nn.Module]


def weights_in_int8(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def products_in_int8(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def low_rank(model: nn.Module, bias: bool = False) -> nn.Module:
    """LoRA on attention and MLP, with the same random factors each time."""
    peft = pytest.importorskip("peft")
    names = "|".join(("qkv", "proj", "lin1", "lin2", "fc1", "fc2"))
    config = peft.LoraConfig(
        target_modules=rf".*(blocks|layers)\.\d+\..*({names})", lora_bias=bias, r=2
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


def low_rank_with_bias(model: nn.Module) -> nn.Module:
    return low_rank(model, bias=True)


# Rounding of activations to int8 turns an error of 1e-6 into a step of 1/127: 0.015 in the original's own features, as much as
# quantising itself changes. So this one tells only that it computes.
TOLERANCES = {products_in_int8: 0.03}
QUANTISE: dict[str, Wrap] = {wrap.__name__: wrap for wrap in (weights_in_int8, products_in_int8)}
ADAPT: dict[str, Wrap] = {wrap.__name__: wrap for wrap in (low_rank, low_rank_with_bias)}


@each_encoder
@pytest.mark.parametrize("wrap", (QUANTISE | ADAPT).values(), ids=QUANTISE | ADAPT)
@torch.no_grad()
def test_wrapped_after_optimize(make: Callable[..., nn.Module], wrap: Wrap) -> None:
    model, pixels = make(), pixels_of()
    plain = copy.deepcopy(model)
    optimize(model)
    before = features(model, pixels)  # packs
    model, plain = wrap(model), wrap(plain)
    found = features(model, pixels)
    assert_close(found, features(plain, pixels), TOLERANCES.get(wrap, 2e-5))
    if wrap not in TOLERANCES:
        assert (found - before).abs().max() > 1e-4 * before.abs().max()  # the wrap can be seen


@each_encoder
@pytest.mark.parametrize("wrap", QUANTISE.values(), ids=QUANTISE)
@torch.no_grad()
def test_quantised_before_optimize(make: Callable[..., nn.Module], wrap: Wrap) -> None:
    model, pixels = wrap(make()), pixels_of()
    wanted = features(model, pixels)
    with optimize(model):
        assert_close(features(model, pixels), wanted, TOLERANCES.get(wrap, 2e-5))


@pytest.mark.parametrize("wrap", ADAPT.values(), ids=ADAPT)
def test_an_adapted_encoder_trains_as_the_original(wrap: Wrap) -> None:
    original, pixels = sam_encoder(), pixels_of()

    def gradients(optimized: bool) -> dict[str, Tensor]:
        model: Any = copy.deepcopy(original)
        if optimized:
            optimize(model)
        model = wrap(model)
        features(model, pixels).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, wanted = gradients(optimized=True), gradients(optimized=False)
    assert found.keys() == wanted.keys()
    assert all("lora" in name for name in wanted)
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 1e-4)


@torch.no_grad()
def test_a_quantised_sam_makes_masks() -> None:
    model = weights_in_int8(sam())
    record = {"image": torch.rand(3, 22, 32) * 255, "original_size": (20, 30)}
    record |= {"point_coords": torch.rand(2, 1, 2) * 32, "point_labels": torch.ones(2, 1)}
    (wanted,) = model([record], multimask_output=True)
    with optimize(model):
        (found,) = model([record], multimask_output=True)
    assert_close(found["low_res_logits"], wanted["low_res_logits"], 1e-4)
    assert (found["masks"] != wanted["masks"]).float().mean() < 1e-2
