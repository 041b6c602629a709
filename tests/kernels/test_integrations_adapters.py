"""optimize() beside peft's LoRA layers and torchao's quantised ones; skipped where these libraries are not installed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels.integrations import optimize
from tests.kernels.encoder_models import MODELS, Example
from tests.kernels.operator_checks import assert_same_gradients
from tests.kernels.test_integrations import assert_close

NAMES = ["segment-anything", "GotOcr2", "Sam, SDPA", "Cellpose-SAM", "timm"]


def with_lora(model: nn.Module) -> Any:
    """The model within peft's, random low-rank layers beside every linear layer of its blocks."""
    peft = pytest.importorskip("peft")
    names = ["qkv", "proj", "lin1", "lin2", "fc1", "fc2"]
    names = [
        n for n, m in model.named_modules() if type(m) is nn.Linear and n.split(".")[-1] in names
    ]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


@pytest.mark.parametrize("before", [True, False], ids=["optimize-then-lora", "lora-then-optimize"])
@pytest.mark.parametrize("example", [MODELS[name] for name in NAMES], ids=NAMES)
def test_pefts_adapters_train_alone_as_in_the_plain_model(example: Example, before: bool) -> None:
    model = example.make()
    plain, optimized = with_lora(copy.deepcopy(model)), model
    if before:
        optimize(optimized)
    optimized = with_lora(optimized)
    if not before:
        optimize(optimized)

    def gradients(model: Any) -> dict[str, Tensor]:
        features = example.features(model)
        (features * torch.linspace(-1, 1, features.numel()).view(features.shape)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, found = gradients(plain), gradients(optimized)
    assert all("lora_" in name for name in found)
    assert_same_gradients(found, wanted, 1e-4)
    with torch.no_grad():
        assert_close(example.features(optimized), example.features(plain))


@torch.no_grad()
def test_merged_adapters_are_seen() -> None:
    """Merging changes the weights in place, behind a packed copy."""
    example = MODELS["segment-anything"]
    plain = with_lora(example.make())
    optimized = copy.deepcopy(plain)
    optimize(optimized)
    example.features(optimized)
    for model in (plain, optimized):
        model.merge_adapter()
    assert_close(example.features(optimized), example.features(plain))


@pytest.mark.parametrize(
    "before", [True, False], ids=["optimize-then-quantise", "quantise-then-optimize"]
)
@torch.no_grad()
def test_torchaos_quantised_layers_compute_as_in_the_plain_model(before: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    example = MODELS["segment-anything"]
    plain = example.make()
    optimized = copy.deepcopy(plain)
    if before:
        optimize(optimized)
    for model in (plain, optimized):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if not before:
        optimize(optimized)
    assert_close(example.features(optimized), example.features(plain))
