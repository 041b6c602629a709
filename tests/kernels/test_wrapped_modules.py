"""Things that people put around an optimized model's modules: hooks, adapters, quantised weights, data parallelism, tracing."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel

from refsam_kernels.integrations import optimize
from tests.kernels.test_integrations import (
    TOLERANCE,
    assert_close,
    each_encoder,
    features,
    pixels_of,
    sam_encoder,
    timm_encoder,
    transformers_encoder,
)


class LowRank(nn.Module):
    """A linear layer and a low-rank one with a bias beside it, as peft's `lora.Linear` with `lora_bias`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=True)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Quantised(Tensor):
    """A weight in int8 that passes for a float32 tensor, as torchao's do; tokens may be rounded at each call."""

    rounds_tokens = False

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is nn.functional.linear:
            x, weight, *bias = args
            if cls.rounds_tokens:
                step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
                x = (x / step).round() * step
            return function(x, weight.values * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{function} of a quantised weight")


def qkv_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """The attentions and their first layers."""
    for module in model.modules():
        if hasattr(module, "qkv"):
            yield module, module.qkv


def add_low_rank(model: nn.Module) -> None:
    for attention, layer in list(qkv_layers(model)):
        attention.qkv = LowRank(layer)


def hook_outputs(model: nn.Module) -> None:
    for _, layer in qkv_layers(model):
        layer.register_forward_hook(lambda module, inputs, output: 2 * output + 1)


def hook_inputs(model: nn.Module) -> None:
    for _, layer in qkv_layers(model):
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def replace_forward(model: nn.Module) -> None:
    for _, layer in qkv_layers(model):
        layer.forward = lambda x, own=layer: nn.functional.linear(x, own.weight, own.bias) + 1


def quantise(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            scale = module.weight.detach().abs().amax() / 127
            values = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Quantised(values, scale), requires_grad=False)


def parametrise(model: nn.Module) -> None:
    for _, layer in qkv_layers(model):
        nn.utils.parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.data.mul_(2)


def drop_bias(model: nn.Module) -> None:
    for _, layer in qkv_layers(model):
        layer.bias = None


WRAPS = {
    wrap.__name__: wrap
    for wrap in (
        add_low_rank,
        hook_outputs,
        hook_inputs,
        replace_forward,
        quantise,
        parametrise,
        drop_bias,
    )
}


@each_encoder
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_wrapped_after_optimize(
    make: Callable[..., nn.Module], wrap: Callable[[nn.Module], None], grad: bool
) -> None:
    torch.manual_seed(0)
    model, pixels = make(), pixels_of()
    plain = copy.deepcopy(model)
    optimize(model)
    with torch.no_grad():
        before = features(model, pixels)  # packs
    for changed in (plain, model):
        torch.manual_seed(1)
        wrap(changed)
    with torch.set_grad_enabled(grad):
        found, wanted = features(model, pixels), features(plain, pixels)
    assert_close(found, wanted, 2e-5)
    assert (found - before).abs().max() > 1e-3 * before.abs().max()  # the wrap can be seen


@each_encoder
@pytest.mark.parametrize("rounds_tokens", [False, True])
@torch.no_grad()
def test_quantised_before_optimize(
    make: Callable[..., nn.Module], rounds_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's value near the middle of a step is rounded up or down: then results are a step apart."""
    monkeypatch.setattr(Quantised, "rounds_tokens", rounds_tokens)
    model, pixels = make(), pixels_of()
    quantise(model)
    wanted = features(model, pixels)
    with optimize(model):
        assert_close(features(model, pixels), wanted, 2e-2 if rounds_tokens else TOLERANCE)


@torch.no_grad()
def test_hooks_of_all_modules_see_every_linear_layer() -> None:
    """The last call of a hooked qkv is the grid's; one before it, on a token of zeros, gives the values of padding."""
    model, pixels = sam_encoder(), pixels_of()

    def linear_calls() -> list[tuple[str, tuple[int, ...]]]:
        names = {module: name for name, module in model.named_modules()}
        calls = []

        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if type(module) is nn.Linear:
                calls.append((names[module], tuple(inputs[0].shape)))

        with register_module_forward_hook(hook):
            features(model, pixels)
        return calls

    wanted = linear_calls()
    with optimize(model):
        features(model, pixels)  # packs
        found = linear_calls()
    zero = ("blocks.0.attn.qkv", (1, 1, 1, 32))
    assert found.count(zero) == 1 and found.index(zero) == 0
    assert [name for name, _ in found[1:]] == [name for name, _ in wanted]
    assert len(wanted) == 8


@each_encoder
@torch.no_grad()
def test_copies_of_data_parallel_compute_with_their_own_weights(
    make: Callable[..., nn.Module],
) -> None:
    """`DataParallel` copies each module by this method, children first; it needs GPUs, the method does not."""
    model, pixels = make(), pixels_of()
    optimize(model)
    wanted = features(model, pixels)
    replica = replicate(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()
    assert_close(features(replica, pixels), wanted)


def replicate(module: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` makes them: children and parameters that are not its module's."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach().clone())
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
    return replica


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("multimask", [False, True])
def test_ddp_trains_an_optimized_sam(process_group: None, multimask: bool) -> None:
    """Its reducer waits for a gradient of each parameter that the original gives one, zeros included."""
    original: Any = transformers_encoder(model="SamModel").train()
    pixels, points = pixels_of(), torch.rand(2, 2, 1, 2) * 32

    def gradients(optimized: bool) -> dict[str, Tensor | None]:
        model = copy.deepcopy(original)
        if optimized:
            optimize(model)
        parallel = DistributedDataParallel(model)
        for _ in range(3):
            model.zero_grad()
            outputs = parallel(pixel_values=pixels, input_points=points, multimask_output=multimask)
            (outputs.pred_masks.square().mean() + outputs.iou_scores.mean()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    model = copy.deepcopy(original)
    outputs = model(pixel_values=pixels, input_points=points, multimask_output=multimask)
    (outputs.pred_masks.square().mean() + outputs.iou_scores.mean()).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for name in unused:  # by the original itself: prompts that were not given
        original.get_parameter(name).requires_grad_(False)
    found, wanted = gradients(optimized=True), gradients(optimized=False)
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None
            continue
        atol = 1e-4 * max(float(gradient.abs().max()), 1e-6)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=max(atol, 1e-7))


@pytest.mark.parametrize("training", [True, False])
def test_timm_drops_what_it_drops_itself(training: bool) -> None:
    model, pixels = timm_encoder(drop_path_rate=0.5).train(training), pixels_of()
    results = []
    for optimized in (False, True):
        if optimized:
            optimize(model)
        torch.manual_seed(3)
        results.append(features(model, pixels))
    assert_close(results[1], results[0])
    torch.manual_seed(4)
    assert torch.equal(features(model, pixels), results[1]) != training


@each_encoder
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_jit_trace_with_its_defaults(make: Callable[..., nn.Module], grad: bool) -> None:
    model, pixels = make(), pixels_of()
    if "transformers" in type(model).__module__:
        pytest.skip("transformers' models return no tuples, which torch.jit.trace wants")
    optimize(model)
    with torch.set_grad_enabled(grad):
        wanted = features(model, pixels)
        traced = torch.jit.trace(model, pixels)
        assert_close(traced(pixels), wanted)
