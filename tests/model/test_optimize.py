"""optimize() and deoptimize(): packed weights for inference, and what training is spared."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from refsam import RefSAM, VideoSession, load_model
from refsam.model import packing
from refsam.model.image_encoder import ImageEncoder
from refsam.model.packing import PackedBlock, automatic_dtype, fuse
from tests.evf_folder import write_evf
from tests.kernels.test_fingerprint import Change, each_change
from tests.model.test_image_encoder import build_encoder, build_trained_encoder
from tests.tiny_model import tiny_model, tiny_trunk_model

# A few roundings, relative to the largest value: sums are taken in another order, GELUs on their way.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 3e-2}
PIXELS = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder() -> ImageEncoder:
    return build_trained_encoder()


@pytest.fixture(params=["packed", "fused"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """How blocks are computed: in oneDNN's layout, or, as on other devices, by the operators."""
    if request.param == "packed":
        yield "packed"
        return
    with mock.patch.object(packing, "can_prepack", return_value=False):
        yield "fused"


@torch.no_grad()
def run(encoder: ImageEncoder) -> tuple[Tensor, ...]:
    features, levels = encoder(PIXELS)
    return features, *levels


def assert_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype == torch.float32
        assert (x - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_results_stay_and_are_undone_exactly(
    encoder: ImageEncoder, dtype: torch.dtype, kind: str
) -> None:
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    before = run(encoder)
    assert encoder.optimize(dtype) is encoder
    optimized = run(encoder)
    assert encoder.product_dtype == dtype
    assert_close(optimized, before, TOLERANCES[dtype])
    assert not all(map(torch.equal, optimized, before)), "nothing was packed"
    assert encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(encoder.state_dict()[name], state[name]) for name in state)
    assert all(map(torch.equal, run(encoder.deoptimize()), before))


def test_packs_on_this_machine(encoder: ImageEncoder) -> None:
    blocks = encoder.optimize(torch.float32).packing.arranged([*encoder.blocks], torch.float32)
    assert all(isinstance(block, PackedBlock) for block in blocks)


@torch.no_grad()
def test_one_perceptron_is_the_mlp_and_its_adapter(encoder: ImageEncoder) -> None:
    block = copy.deepcopy(encoder.blocks[3]).double()
    x, norm = torch.randn(1, 10, 10, 48, dtype=torch.float64), nn.LayerNorm(48).double()
    fused = fuse(block.weights(), torch.float64)
    assert fused.mlp_adapter is None and fused.mlp.fc1_weight.shape == (96 + 12, 48)
    wanted, found = block(x, x, norm), packing.run_block(fused, x, x, norm)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def test_done_again_it_changes_nothing(encoder: ImageEncoder) -> None:
    first = run(encoder.optimize(torch.float32))
    made = encoder.packing._made
    assert all(map(torch.equal, run(encoder.optimize(torch.float32)), first))
    assert encoder.packing._made is made


def test_new_weights_are_heeded_at_once(encoder: ImageEncoder, kind: str) -> None:
    run(encoder.optimize(torch.float32))
    other = build_encoder(seed=1)
    encoder.load_state_dict(other.state_dict())
    assert_close(run(encoder), run(other), TOLERANCES[torch.float32])
    with torch.no_grad():
        encoder.blocks[1].mlp.lin2.weight.mul_(2)
        other.blocks[1].mlp.lin2.weight.mul_(2)
    assert_close(run(encoder), run(other), TOLERANCES[torch.float32])


@each_change
def test_weights_changed_behind_the_count_of_versions(
    encoder: ImageEncoder, kind: str, change: Change
) -> None:
    other = copy.deepcopy(encoder)
    run(encoder.optimize(torch.float32))
    with torch.no_grad():
        change(list(encoder.blocks.parameters()))
        change(list(other.blocks.parameters()))
    assert_close(run(encoder), run(other), TOLERANCES[torch.float32])


def test_nobody_looks_at_fixed_weights(encoder: ImageEncoder) -> None:
    wanted = run(encoder.optimize(torch.float32))
    encoder.optimize(torch.float32, fixed_weights=True)
    assert all(map(torch.equal, run(encoder), wanted))
    with torch.no_grad():
        encoder.blocks[1].mlp.lin2.weight.mul_(2)
    assert all(map(torch.equal, run(encoder), wanted)), "the packed copy was made anew"
    assert not torch.equal(run(encoder.optimize(torch.float32))[0], wanted[0])


def test_autocast_goes_before_the_dtype(encoder: ImageEncoder, kind: str) -> None:
    wanted = run(encoder.optimize(torch.bfloat16))
    encoder.optimize(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder.product_dtype == torch.bfloat16
        found = run(encoder)
    # Patch embedding and neck are under autocast too.
    assert all(
        (x - y).abs().max() <= 3e-2 * y.abs().max() for x, y in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("mode", ["float64", "float16", "bfloat16"])
def test_parameters_of_another_dtype(encoder: ImageEncoder, mode: str) -> None:
    dtype = getattr(torch, mode)
    before = run(encoder)
    with torch.no_grad():
        features, _ = encoder.to(dtype).optimize()(PIXELS.to(dtype))
    assert features.dtype == encoder.product_dtype == dtype
    assert (features - before[0]).abs().max() <= 5e-2 * before[0].abs().max()


def test_autograd_uses_the_parameters(encoder: ImageEncoder) -> None:
    wanted, _ = encoder(PIXELS)
    found, _ = encoder.optimize(torch.bfloat16)(PIXELS)
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert encoder.blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.slow
@torch.no_grad()
def test_compiled_graphs_use_the_parameters(encoder: ImageEncoder) -> None:
    wanted, _ = encoder(PIXELS)
    compiled = torch.compile(encoder.optimize(torch.bfloat16), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(PIXELS)[0], wanted)


def test_inference_mode_leaves_nothing_unusable_behind(encoder: ImageEncoder) -> None:
    encoder.optimize(torch.float32)
    with torch.inference_mode():
        inside, _ = encoder(PIXELS)
    assert torch.equal(run(encoder)[0], inside)


def test_training_mode(encoder: ImageEncoder) -> None:
    encoder.optimize()
    encoder.train()
    assert encoder.packing is None
    with pytest.raises(ValueError, match="optimize: got an encoder in training mode, wanted eval"):
        encoder.optimize()
    model = tiny_model().train()
    with pytest.raises(ValueError, match="optimize: got a model in training mode, wanted eval"):
        model.optimize()
    with pytest.raises(
        ValueError, match=r"dtype: got torch\.int16, wanted a floating-point type, torch\.int8"
    ):
        encoder.eval().optimize(torch.int16)


def test_copies_and_pickles(encoder: ImageEncoder) -> None:
    wanted = run(encoder.optimize(torch.float32))
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert other.packing.dtype == torch.float32
        assert all(map(torch.equal, run(other), wanted))


def test_threads_pack_once_each_at_most_and_agree(encoder: ImageEncoder) -> None:
    from concurrent.futures import ThreadPoolExecutor

    wanted = run(encoder.optimize(torch.float32))
    encoder.deoptimize().optimize(torch.float32)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, [encoder] * 8):
            assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    ("width", "has_bfloat16", "wanted"),
    [(768, True, torch.bfloat16), (768, False, torch.float32), (32, True, torch.float32)],
)
def test_automatic_dtype(width: int, has_bfloat16: bool, wanted: torch.dtype) -> None:
    with mock.patch.object(packing, "has_bfloat16", return_value=has_bfloat16):
        assert automatic_dtype(torch.empty(width, width)) == wanted
        assert automatic_dtype(torch.empty(width, width).double()) == torch.float64
        assert automatic_dtype(torch.empty(width, width, device="meta")) == torch.float32


@pytest.mark.parametrize(
    ("found", "wanted"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)],
)  # fmt: skip
def test_what_the_cpu_has(found: dict[str, bool], wanted: bool) -> None:
    with mock.patch.object(torch.cpu, "get_capabilities", create=True, return_value=found):
        assert packing.has_bfloat16() is wanted


def test_a_torch_that_cannot_say_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not packing.has_bfloat16()


def frame() -> Tensor:
    return torch.randint(0, 256, (40, 64, 3), generator=torch.Generator().manual_seed(0)).byte()


def test_a_session_packs_unless_told_otherwise() -> None:
    plain, packed, told = tiny_model(), tiny_model(), tiny_model()
    told.optimize(torch.bfloat16)
    expected = VideoSession(plain, ["the red cup"], optimize=False).step(frame()).logits
    found = VideoSession(packed, ["the red cup"]).step(frame()).logits
    VideoSession(told, ["the red cup"])
    assert (plain.is_optimized, packed.is_optimized) == (False, True)
    assert told.image_encoder.product_dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_session_with_fixed_weights_makes_prompts_once() -> None:
    fixed, other = tiny_model().optimize(torch.float32, fixed_weights=True), tiny_model()
    assert fixed.fixed_packing and not other.optimize(torch.float32).fixed_packing
    sessions = [VideoSession(model, ["the red cup"]) for model in (fixed, other)]
    with mock.patch.object(fixed, "encode_text", wraps=fixed.encode_text) as encode_text:
        for change in (None, lambda s: s.add("the dog"), lambda s: s.remove(0)):
            calls = encode_text.call_count
            for session in sessions if change else ():
                change(session)
            for _ in range(3):
                found, wanted = (session.step(frame()).logits for session in sessions)
                assert torch.equal(found, wanted)
            assert encode_text.call_count <= calls + 2  # an expression that is new, and all of them


@pytest.mark.parametrize("kind", ["plain", "trunk", "evf"])
def test_training_ends_the_promise_of_fixed_weights(kind: str, tmp_path: Path) -> None:
    """A later promise holds for the weights of that time, in every part and in a session that continues."""
    models = {"plain": tiny_model, "trunk": tiny_trunk_model}
    model = models[kind]() if kind in models else load_model(write_evf(tmp_path / "evf"))
    model.optimize(torch.float32, fixed_weights=True)
    session = VideoSession(model, ["the red cup"])
    session.step(frame())
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.eval()
    plain = VideoSession(copy.deepcopy(model), ["the red cup"], optimize=False)
    assert not model.fixed_packing
    model.optimize(torch.float32, fixed_weights=True)
    session.reset()
    found, wanted = session.step(frame()).logits, plain.step(frame()).logits
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_the_whole_model_round_trip() -> None:
    model: RefSAM = tiny_model()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        pixels, _ = model.preprocess(frame()[None])
        before = model.encode_image(pixels).levels
        assert model.optimize(torch.float32) is model and model.is_optimized
        optimized = model.encode_image(pixels).levels
        assert (optimized - before).abs().max() <= 1e-5 * before.abs().max()
        assert model.deoptimize() is model and not model.is_optimized
        assert torch.equal(model.encode_image(pixels).levels, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def trainable_adapters(encoder: ImageEncoder) -> ImageEncoder:
    encoder.requires_grad_(False)
    for block in encoder.blocks[2:]:
        block.Space_Adapter.requires_grad_(True)
        block.MLP_Adapter.requires_grad_(True)
    return encoder.train()


def saved_elements(encoder: ImageEncoder, pixels: Tensor) -> tuple[int, dict[str, Tensor]]:
    """Elements kept for the backward, parameters aside, and the gradients."""
    parameters = {parameter.data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    encoder.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features, levels = encoder(pixels)
    total = sum(kept.values())
    (features.square().sum() + levels[0].sum()).backward()
    named = encoder.named_parameters()
    return total, {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_a_frozen_first_half_keeps_nothing_for_the_backward(encoder: ImageEncoder) -> None:
    kept, gradients = saved_elements(trainable_adapters(encoder), PIXELS)
    records: list[bool] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, __, out: records.append(out[0].requires_grad))
    encoder(PIXELS)
    assert records == [False, False, True, True]
    assert gradients.keys() == {n for n, p in encoder.named_parameters() if p.requires_grad}
    encoder.requires_grad_(True)
    assert saved_elements(encoder, PIXELS)[0] > 1.8 * kept


def test_recomputing_blocks_gives_the_same_gradients_and_keeps_less(encoder: ImageEncoder) -> None:
    kept, wanted = saved_elements(trainable_adapters(encoder), PIXELS)
    encoder.activation_checkpointing = True
    kept_less, found = saved_elements(encoder, PIXELS)
    assert kept_less < 0.5 * kept
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
