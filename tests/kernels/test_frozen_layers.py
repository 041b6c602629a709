"""Frozen layers beside adapters in a training step: packed copies give the same features and gradients."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from refsam_kernels import flop_formulas, frozen_linear
from refsam_kernels.frozen_linear import FrozenCopy, FrozenLinear, frozen_mlp
from refsam_kernels.integrations import optimize
from refsam_kernels.integrations.encoders import find_blocks
from refsam_kernels.integrations.modules import Linear
from refsam_kernels.packed_linear import PackedCopy
from tests.kernels.encoder_models import MODELS, Example, low_rank, pixels_of
from tests.kernels.test_integrations import assert_close

DTYPES = [torch.float32, torch.bfloat16]


def layer(train: bool = False, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(33, 47, bias=bias).requires_grad_(train)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, 33, generator=torch.Generator().manual_seed(1))
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_and_gradients_of_both_orders(dtype: torch.dtype, bias: bool) -> None:
    """Against float64; the result goes through a square, so that its second gradient is not zero."""
    module, x = layer(bias=bias).to(dtype), tokens(2, 3, 5, dtype=dtype)

    def results(call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        y = call(x)
        (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x)
        return [y, first, second]

    frozen = FrozenCopy(PackedCopy())
    assert frozen.is_supported(module, x)
    found = results(lambda x: frozen(module, x), x)
    theirs = results(module, x)
    exact = results(copy.deepcopy(module).double(), x.detach().double().requires_grad_())
    for ours, plain, wanted in zip(found, theirs, exact, strict=True):
        assert ours.dtype == dtype
        error, allowed = ((each.double() - wanted).abs().max() for each in (ours, plain))
        assert error <= 2 * allowed + 1e-6 * wanted.abs().max()


def test_packed_products_are_counted() -> None:
    """Those of the result and of the input's gradient, as torch's counter counts the module's own."""
    module, x = layer(), tokens(2, 3)
    counted = []
    for call in (module, partial(FrozenCopy(PackedCopy()), module)):
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            call(x).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted == [2 * 2 * 6 * 33 * 47] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_mlp_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64; the last part is smaller, the gradient comes with strides."""
    monkeypatch.setattr(frozen_linear, "ROWS", 4)
    torch.manual_seed(0)
    first, second = nn.Linear(33, 47), nn.Linear(47, 33)
    plain = nn.Sequential(first, nn.GELU(), second).requires_grad_(False)
    upper = torch.randn(33, 5, 3).permute(2, 1, 0)

    def results(call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        y = call(x)
        return [y, *torch.autograd.grad(y, x, upper.to(y.dtype))]

    x = tokens(3, 5)
    exact = results(copy.deepcopy(plain).double(), x.detach().double().requires_grad_())
    plain, x = plain.to(dtype), x.detach().to(dtype).requires_grad_()
    layers = [FrozenLinear.of(each.weight, each.bias) for each in (first, second)]
    found, theirs = results(lambda x: frozen_mlp(x, *layers), x), results(plain, x)
    for ours, other, wanted in zip(found, theirs, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == wanted.shape
        error, allowed = ((each.double() - wanted).abs().max() for each in (ours, other))
        assert error <= 2 * allowed + 1e-6 * wanted.abs().max()


def test_autocast_computes_in_its_dtype() -> None:
    module, x = layer(), tokens(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = FrozenCopy(PackedCopy())
        assert frozen.is_supported(module, x)
        found, wanted = frozen(module, x), module(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert_close(found.float(), wanted.float(), 1e-2)
    found.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert_close(x.grad, module.weight.sum(0).expand(3, 4, 33), 1e-2)


def test_changed_weights_are_packed_again() -> None:
    module, x, frozen = layer(), tokens(3), FrozenCopy(PackedCopy())
    frozen(module, x)
    with torch.no_grad():
        module.weight.mul_(2)
    assert_close(frozen(module, x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(module, x).dtype == torch.bfloat16
    assert_close(copy.deepcopy(frozen)(module, x), module(x))


def plain_tensor(module: nn.Linear) -> None:
    """As FSDP1 leaves a module: its weight is a part of a flat parameter."""
    weight = module.weight.detach().requires_grad_()
    del module.weight
    module.weight = weight


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.requires_grad_(True),
        lambda module: module.bias.requires_grad_(True),
        lambda module: module.double(),
        lambda module: plain_tensor(module),
    ],
    ids=["trains", "its bias trains", "float64", "FSDP1"],
)
def test_does_not_stand_in_for_other_layers(change: Callable[[nn.Module], Any]) -> None:
    module = layer()
    change(module)
    assert not FrozenCopy.is_supported(module, tokens(3, dtype=module.weight.dtype))


def test_does_not_stand_in_elsewhere() -> None:
    module, x = layer(), tokens(3)
    with torch.no_grad():
        assert not FrozenCopy.is_supported(module, x)
    with torch.autocast("cpu", torch.float16):
        assert not FrozenCopy.is_supported(module, x)
    assert not FrozenCopy.is_supported(module, x.detach())
    assert not FrozenCopy.is_supported(module, x.double())
    assert not FrozenCopy.is_supported(module, x[:0])
    assert not FrozenCopy.is_supported(module.to("meta"), x)


def adapted(example: Example) -> Any:
    """The model, frozen but for low-rank layers beside each qkv."""
    return low_rank(example.make())


@pytest.mark.parametrize("name", ["segment-anything", "detectron2"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_adapters_train_as_in_the_plain_model(name: str, autocast: bool) -> None:
    example = MODELS[name]
    model = adapted(example)
    exact = copy.deepcopy(model)

    def gradients(model: nn.Module, autocast: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = example.features(model).float()
        (features * torch.linspace(-1, 1, features.numel()).view(features.shape)).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted, theirs = gradients(exact, False), gradients(model, autocast)
    with optimize(model):
        found = gradients(model, autocast)
    assert found.keys() == wanted.keys()
    assert all("up" in name or "down" in name for name in found)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        allowed = 1e-4 * max(float(gradient.abs().max()), 1e-3 * largest)
        if autocast:
            allowed = max(allowed, 2 * float((theirs[name] - gradient).abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=allowed)


def test_layers_within_adapters_are_packed_and_still_called() -> None:
    """A change of their weights, as a merge makes it, and hooks count; one layer may stand in several adapters."""
    model = adapted(MODELS["segment-anything"])
    first, last = (block.attn.qkv for block in model.blocks)
    last.base_layer = first.base_layer
    plain, seen = copy.deepcopy(model), []
    handle = optimize(model)
    with torch.profiler.profile() as profile:
        model(pixels_of()).sum().backward()
    assert "aten::addmm" not in {
        event.key for event in profile.events()
    }  # torch's own layer with a bias
    first.base_layer.register_forward_hook(lambda *_: seen.append(1))
    for each in (model, plain):
        each.blocks[0].attn.qkv.base_layer.weight.data.mul_(0.5)
    assert_close(model(pixels_of()), plain(pixels_of()))
    assert len(seen) == 3  # two blocks, and a token of zeros before the windowed one
    handle.undo()
    assert torch.equal(model(pixels_of()), plain(pixels_of()))


def kept_norms(model: Any) -> tuple[Tensor, list[bool]]:
    """The features, and of each block whether the first norm's result lies there still, for the backward pass."""
    results: list[Any] = []
    note = lambda _, inputs, output: results.append(StorageWeakRef(output.untyped_storage()))  # noqa: E731
    handles = [block.norm1.register_forward_hook(note) for block in model.blocks]
    features = model(pixels_of().requires_grad_())
    for handle in handles:
        handle.remove()
    return features, [not each.expired() for each in results]


def test_adapters_keep_no_norm() -> None:
    """The plain model's first block keeps a copy in windows."""
    model = adapted(MODELS["segment-anything"])
    assert kept_norms(model)[1] == [False, True]
    with optimize(model):
        features, kept = kept_norms(model)
        assert kept == [False, False]
        features.sum().backward()


def test_others_decide_what_is_kept() -> None:
    """A checkpoint keeps nothing of a block, and computes it again."""
    model, x = adapted(MODELS["segment-anything"]), pixels_of().requires_grad_()
    optimize(model)
    model(x).square().sum().backward()
    assert x.grad is not None
    wanted, x.grad = x.grad, None
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert x.grad is not None
    assert_close(x.grad, wanted)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        assert kept_norms(model)[1] == [True, True]
    assert any(each.shape[-1] == 32 for each in kept)


@pytest.mark.parametrize("backward", [False, True])
def test_hooked_layers_are_called(backward: bool) -> None:
    module, x, seen = layer(), tokens(3), []
    register = module.register_full_backward_hook if backward else module.register_forward_hook
    register(lambda *_: seen.append(1))
    Linear()(module, x).sum().backward()
    assert seen == [1]


def test_adapters_see_no_padding_but_a_token_of_zeros() -> None:
    model, seen = adapted(MODELS["segment-anything"]), []
    optimize(model)
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    model(pixels_of())
    assert [tuple(each.shape) for each in seen] == [(1, 1, 1, 32), (2, 8, 8, 32), (2, 8, 8, 32)]
    assert not seen[0].any()


def test_tokens_and_their_gradients_are_never_transposed() -> None:
    """The patches' convolution and the neck's have images in another layout."""
    model = adapted(MODELS["segment-anything"])

    def layouts() -> list[bool]:
        found: list[bool] = []
        handles = [
            block.norm2.register_forward_pre_hook(
                lambda _, inputs: found.append(inputs[0].is_contiguous())
            )
            for block in model.blocks
        ]
        watch = lambda gradient: found.append(gradient.is_contiguous())  # noqa: E731
        handles += [
            block.mlp.register_forward_hook(lambda *call: call[-1].register_hook(watch) and None)
            for block in model.blocks
        ]
        model(pixels_of()).square().mean().backward()
        for handle in handles:
            handle.remove()
        return found

    assert layouts() == [False] * 4
    with optimize(model):
        assert layouts() == [True] * 4


@pytest.mark.parametrize("name", ["segment-anything", "VitDet"])
def test_a_block_may_be_called_by_keyword(name: str) -> None:
    model = MODELS[name].make()
    optimize(model)
    for block in find_blocks(model):
        shape = (1, 32, 8, 8) if name == "VitDet" else (1, 8, 8, 32)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found, wanted = block.module(**{block.kind.block_takes[0]: x}), block.module(x)
        assert_close(found[0], wanted[0])


def test_blocks_below_the_first_adapter_compute_as_in_inference() -> None:
    """No gradient is wanted of them, and no copy of their transposed weights."""
    model: Any = MODELS["segment-anything"].make().requires_grad_(False)
    optimize(model)
    with torch.no_grad():
        wanted = model(pixels_of())
    with torch.profiler.profile() as profile:
        found = model(pixels_of())
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 8
    assert torch.equal(found, wanted)
    assert not found.requires_grad
