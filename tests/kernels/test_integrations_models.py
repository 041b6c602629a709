"""optimize() on every model with SAM's blocks inside: same outputs, gradients and weights, and back."""

import copy
import importlib.util
import pickle
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from refsam_kernels.integrations import encoders, optimize
from tests.kernels.encoder_models import MODELS, Example, pixels_of
from tests.kernels.operator_checks import assert_same_gradients
from tests.kernels.test_integrations import assert_close, sam

each_model = pytest.mark.parametrize("example", MODELS.values(), ids=MODELS.keys())


@each_model
@torch.no_grad()
def test_features_are_the_original_ones_and_undo_restores_their_bits(example: Example) -> None:
    model = example.make()
    wanted, state = example.features(model), set(model.state_dict())
    handle = optimize(model)
    with torch.profiler.profile() as profile:
        found = example.features(model)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["refsam_kernels::rel_pos_attention"] == example.attentions
    assert_close(found, wanted)
    assert set(model.state_dict()) == state
    handle.undo()
    assert torch.equal(example.features(model), wanted)


@each_model
def test_gradients_are_the_original_ones(example: Example) -> None:
    model = example.make()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        features = example.features(model)
        (features * torch.linspace(-1, 1, features.numel()).view(features.shape)).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    with optimize(model):
        found = gradients()
    assert_same_gradients(found, wanted, 1e-4)


@each_model
@torch.no_grad()
def test_bfloat16_is_at_most_twice_as_far_off(example: Example) -> None:
    model = example.make()
    exact = example.features(model)
    theirs = example.features(model.bfloat16())
    with optimize(model):
        ours = example.features(model)
    assert ours.dtype == theirs.dtype
    assert (ours.float() - exact).abs().max() <= 2 * (theirs.float() - exact).abs().max()


@pytest.mark.parametrize("name", ["segment-anything", "GotOcr2", "VitDet", "SegGpt", "timm"])
@torch.no_grad()
def test_copies_compute_with_their_own_weights(name: str) -> None:
    """One for each way of writing a block."""
    example = MODELS[name]
    model = example.make()
    optimize(model)
    before = example.features(model)
    twin = copy.deepcopy(model)
    assert torch.equal(example.features(twin), before)
    for name, parameter in twin.named_parameters():
        if "rel_pos" in name:
            parameter.mul_(2)
    assert not torch.equal(example.features(twin), before)
    assert torch.equal(example.features(model), before)


def blocks_of(model: Any) -> list[encoders.Block]:
    return encoders.find_blocks(model)


@pytest.mark.parametrize(
    "name", ["GotOcr2", "VitDet", "SegGpt", "detectron2", "DeepSeek-OCR's own"]
)
def test_compiles_without_a_break(name: str) -> None:
    torch._dynamo.reset()  # other tests have used up how often a function may be compiled anew
    model = MODELS[name].make()
    optimize(model)
    for block in blocks_of(model):
        tokens = torch.randn(1, 8, 8, 32)
        compiled = torch.compile(block.module, fullgraph=True, backend="eager")
        found, wanted = (block.kind.compute(each, tokens) for each in (compiled, block.module))
        assert_close(found, wanted)


WEIGHTS = {name: example for name, example in MODELS.items() if example.gives_weights}


@pytest.mark.parametrize("example", WEIGHTS.values(), ids=WEIGHTS)
@torch.no_grad()
def test_weights_that_are_asked_for_are_the_originals(example: Example) -> None:
    model = example.make()
    wanted = example.run(model, output_attentions=True)
    optimize(model)
    encoders.say_that_weights_are_made.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = example.run(model, output_attentions=True)
        example.run(model, output_attentions=True)
    assert len([each for each in said if "output_attentions=True" in str(each.message)]) == 1
    assert len(found.attentions) == len(wanted.attentions) == example.attentions
    for ours, theirs in zip(found.attentions, wanted.attentions, strict=True):
        assert_close(ours, theirs)
    assert_close(getattr(found, example.feature), getattr(wanted, example.feature))
    after = example.run(model)
    assert_close(getattr(after, example.feature), getattr(wanted, example.feature))


@pytest.mark.parametrize("name", ["GotOcr2", "VitDet", "DeepseekOcr2, SDPA"])
def test_activations_are_checkpointed_as_before(name: str) -> None:
    """transformers checkpoints within a layer's own method."""
    example = MODELS[name]
    model = example.make().train()
    optimize(model)
    example.features(model).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls: list[int] = []
    blocks_of(model)[0].attention.register_forward_hook(lambda *_: calls.append(1))
    example.features(model).sum().backward()
    assert len(calls) == 2  # once forward, once again for the backward
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert_close(parameter.grad, wanted[name])


def other_formula(model: Any) -> None:
    """Positions are added to keys that were scaled: the structure is SAM's, the result not."""
    attention = blocks_of(model)[1].attention
    kind = type(attention)

    def forward(self: Any, x: Tensor) -> Tensor:
        return kind.forward(self, 2 * x)

    attention.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def pooled(model: Any) -> None:
    """As MViTv2's attention."""
    blocks_of(model)[0].attention.pool_q = nn.Conv2d(16, 16, 3, stride=2)


def other_positions(model: Any) -> None:
    """As timm's `vision_transformer_relpos`."""
    attention = blocks_of(model)[0].attention
    del attention.rel_pos_h, attention.rel_pos_w
    attention.rel_pos = nn.Embedding(9, 2)


def other_scale(model: Any) -> None:
    blocks_of(model)[0].attention.scale = 1.0


def half_replaced(model: Any) -> None:
    optimize(model.blocks[1])


def on_meta(model: Any) -> None:
    model.to("meta")


def partly_on_meta(model: Any) -> None:
    model.blocks[1].mlp.lin2.to("meta")


def another_version(model: Any) -> None:
    for block in model.blocks:
        kind = type(block)
        forward = lambda self, x, mask: x  # noqa: E731
        block.__class__ = type("Block", (kind,), {"forward": forward})


def two_window_sizes(model: Any) -> None:
    model.blocks[0].window_size = (3, 3)


def a_negative_window(model: Any) -> None:
    model.blocks[0].window_size = -1


REFUSED = {
    other_formula: r"model\.blocks\.1: computes something else than SAM's block: on random numbers",
    pooled: r"model\.blocks\.0\.attn: got pooled queries or keys \(pool_q\), wanted as many as tokens",
    other_positions: r"got an? Attention with positions of another kind, rel_pos \(a Embedding\)",
    other_scale: r"model\.blocks\.0\.attn\.scale: got 1\.0, wanted 16 \*\* -0\.5",
    half_replaced: r"model\.blocks\.1\.forward: got one that was replaced before",
    on_meta: r"model\.blocks\.0\.\S+: got weights on the meta device, wanted loaded weights",
    partly_on_meta: r"model\.blocks\.1\.mlp\.lin2\.weight: got weights on the meta device",
    another_version: r"model\.blocks\.0\.forward: got parameters x, mask, wanted x: this version of",
    two_window_sizes: r"model\.blocks\.0\.window_size: got \(3, 3\), wanted one number",
    a_negative_window: r"model\.blocks\.0\.window_size: got -1, wanted one number, 0 or more",
}


@pytest.mark.parametrize(
    ("change", "words"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_refuses_what_differs_in_words(change: Any, words: str) -> None:
    model = MODELS["segment-anything"].make()
    change(model)
    replaced = [module for module in model.modules() if "forward" in vars(module)]
    with pytest.raises(ValueError, match=words):
        optimize(model)
    assert [module for module in model.modules() if "forward" in vars(module)] == replaced


def test_the_check_can_be_left_out() -> None:
    model = MODELS["segment-anything"].make()
    other_formula(model)
    optimize(model, check=False).undo()


def timm_model(name: str, **sizes: Any) -> nn.Module:
    from tests.timm_modeling import torchvision_to_import

    if not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed: pip install --no-deps timm")
    with torchvision_to_import():
        module = __import__(f"timm.models.{name}", fromlist=[name])
    return {
        "mvitv2": lambda: module.MultiScaleVit(module.MultiScaleVitCfg(depths=(1, 1), embed_dim=16, num_heads=1)),
        "vision_transformer_relpos": lambda: module.VisionTransformerRelPos(img_size=32, embed_dim=32, depth=1, num_heads=2),
    }[name]()  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mvitv2", r"attn: got pooled queries or keys \(pool_q, pool_k, pool_v\)"),
        (
            "vision_transformer_relpos",
            r"blocks\.0\.attn: got a RelPosAttention with positions of another kind",
        ),
    ],
)
def test_refuses_other_encoders_of_timm(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimize(timm_model(name))


def test_a_hook_or_training_does_not_see_the_check() -> None:
    model, seen = MODELS["segment-anything"].make().train(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    state = torch.get_rng_state()
    optimize(model)
    assert not seen
    assert model.blocks[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_positions_do_not_hide_another_formula() -> None:
    """A fresh model's tables are zero; the check gives its copy random ones."""
    model = MODELS["segment-anything"].make()
    for block in model.blocks:
        nn.init.zeros_(block.attn.rel_pos_h)
        nn.init.zeros_(block.attn.rel_pos_w)
    attention = model.blocks[0].attn
    kind = type(attention)

    def forward(self: Any, x: Tensor) -> Tensor:
        own, self.rel_pos_h = self.rel_pos_h, nn.Parameter(self.rel_pos_h * 2)
        result = kind.forward(self, x)
        self.rel_pos_h = own
        return result

    attention.__class__ = type("Attention", (kind,), {"forward": forward})
    with pytest.raises(ValueError, match="computes something else"):
        optimize(model)


def test_pickles() -> None:
    model = MODELS["GotOcr2"].make()
    optimize(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(MODELS["GotOcr2"].features(again), MODELS["GotOcr2"].features(model))


def test_ddp_around_a_model_is_seen_through(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        example = MODELS["GotOcr2"]
        plain = example.make()
        parallel = DistributedDataParallel(copy.deepcopy(plain))
        optimize(parallel)
        for model in (plain, parallel):
            example.features(model).sum().backward()
        for ours, theirs in zip(parallel.parameters(), plain.parameters(), strict=True):
            atol = 1e-4 * max(float(theirs.grad.abs().max()), 1e-3)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=atol)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_fsdp_may_wrap_an_optimized_model(tmp_path: Path) -> None:
    """FSDP2 shards the parameters of each block and gathers them for its call."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        example = MODELS["GotOcr2"]
        model = example.make()
        wanted = example.features(model)
        optimize(model)
        mesh = init_device_mesh("cpu", (1,))
        for block in blocks_of(model):
            fully_shard(block.module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert_close(model(pixels_of()).last_hidden_state, wanted)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda model: torch.compile(model, backend="eager"),
            r"a OptimizedModule, .*before torch\.compile",
        ),
        (
            lambda model: torch.jit.trace(model, pixels_of()),
            r"a TopLevelTracedModule, .*before torch\.jit",
        ),
        (
            lambda model: torch.jit.script(nn.Linear(2, 2)),
            r"a RecursiveScriptModule, .*before torch\.jit",
        ),
    ],
    ids=["compiled", "traced", "scripted"],
)
def test_what_was_made_of_a_model_is_refused_in_words(change: Any, words: str) -> None:
    made = change(MODELS["segment-anything"].make())
    with pytest.raises(ValueError, match=words):
        optimize(made)


def test_a_decoder_without_weights_is_refused_in_words() -> None:
    model: Any = sam()
    model.mask_decoder.output_upscaling.to("meta")
    with pytest.raises(ValueError, match=r"output_upscaling\.0\.weight: got weights on the meta"):
        optimize(model)


@torch.no_grad()
def test_half_precision() -> None:
    example = MODELS["GotOcr2"]
    model = example.make()
    exact = example.features(model)
    theirs = example.features(model.half())
    optimize(model)
    ours = example.features(model)
    assert ours.dtype == torch.float16
    assert (ours.float() - exact).abs().max() <= 2 * (theirs.float() - exact).abs().max()


def test_the_list_names_every_model_that_is_tested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["integrations", "--list"])
    runpy.run_module("refsam_kernels.integrations", run_name="__main__")
    printed = capsys.readouterr().out
    for name in MODELS:
        assert name.split("'")[0].split(",")[0] in printed.replace("SegGPT", "SegGpt")


def test_the_list_wants_its_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["integrations"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("refsam_kernels.integrations", run_name="__main__")
    assert "--list" in capsys.readouterr().err
