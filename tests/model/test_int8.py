"""optimize(dtype=torch.int8): near the float results, undone exactly, weights released, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from refsam.model.image_encoder import ImageEncoder
from refsam.model.int8_block import Int8Block
from tests.model.test_image_encoder import build_encoder, build_trained_encoder
from tests.tiny_model import tiny_model

PIXELS = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
# Error of four blocks of random weights, relative to the features: measured 0.006.
TOLERANCE = 0.02


@pytest.fixture
def encoder() -> ImageEncoder:
    return build_trained_encoder()


@torch.no_grad()
def run(encoder: ImageEncoder, pixels: Tensor = PIXELS) -> tuple[Tensor, ...]:
    features, levels = encoder(pixels)
    return features, *levels


def assert_near(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert 0 < (x - y).norm() <= TOLERANCE * y.norm()


def test_near_the_float_results_and_undone_exactly(encoder: ImageEncoder) -> None:
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    before = run(encoder)
    found = run(encoder.optimize(torch.int8))
    assert encoder.product_dtype == torch.int8
    assert all(isinstance(block, Int8Block) for block in encoder.packing._made[1][1:-1])
    assert_near(found, before)
    assert all(map(torch.equal, run(encoder), found))
    assert all(torch.equal(encoder.state_dict()[name], state[name]) for name in state)
    assert all(map(torch.equal, run(encoder.deoptimize()), before))


def test_a_rectangle(encoder: ImageEncoder) -> None:
    pixels = PIXELS[:, :, :96]
    assert_near(run(copy.deepcopy(encoder).optimize(torch.int8), pixels), run(encoder, pixels))


def test_new_weights_are_heeded(encoder: ImageEncoder) -> None:
    run(encoder.optimize(torch.int8))
    other = build_encoder(seed=1)
    encoder.load_state_dict(other.state_dict())
    assert all(map(torch.equal, run(encoder), run(other.optimize(torch.int8))))


def test_bfloat16_parameters(encoder: ImageEncoder) -> None:
    before, _ = encoder(PIXELS)
    with torch.no_grad():
        found, _ = encoder.bfloat16().optimize(torch.int8)(PIXELS.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - before).norm() <= 2 * TOLERANCE * before.norm()


def test_autocast_does_not_go_before_int8(encoder: ImageEncoder) -> None:
    encoder.optimize(torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder.product_dtype == torch.int8
        features, _ = run(encoder)[:2]
    assert features.isfinite().all()


def test_autograd_uses_the_parameters(encoder: ImageEncoder) -> None:
    wanted, _ = encoder(PIXELS)
    found, _ = encoder.optimize(torch.int8)(PIXELS)
    assert torch.equal(found, wanted)


def test_a_value_that_is_not_finite_stays_in_its_image(encoder: ImageEncoder) -> None:
    pixels = PIXELS.clone()
    pixels[1, 0, 5, 5] = float("nan")
    clean = run(encoder.optimize(torch.int8))
    found = run(encoder, pixels)
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[0], y[0])
        assert not x[1].isfinite().all()


def test_weights_that_are_not_finite_are_refused(encoder: ImageEncoder) -> None:
    with torch.no_grad():
        encoder.blocks[0].mlp.lin1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight: got NaN or infinity, wanted finite values"):
        run(encoder.optimize(torch.int8))


def test_released_weights(encoder: ImageEncoder) -> None:
    wanted = run(encoder.optimize(torch.int8))
    before = sum(parameter.numel() for parameter in encoder.blocks.parameters())
    assert encoder.optimize(torch.int8, release_weights=True) is encoder
    assert sum(parameter.numel() for parameter in encoder.blocks.parameters()) < before / 4
    assert all(map(torch.equal, run(encoder), wanted))
    assert encoder.optimize(torch.int8, release_weights=True) is encoder
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert all(map(torch.equal, run(other), wanted))


def test_released_weights_cannot_come_back(encoder: ImageEncoder) -> None:
    encoder.optimize(torch.int8, release_weights=True)
    calls = {
        r"state_dict\(\)": encoder.state_dict,
        r"deoptimize\(\)": encoder.deoptimize,
        r"train\(\)": encoder.train,
        "optimize in another way": encoder.optimize,
        "autograd": lambda: encoder(PIXELS),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: got an encoder whose float weights"):
            call()
    assert not encoder.training


def test_a_model_without_its_weights_keeps_refusing() -> None:
    model = tiny_model().optimize(torch.int8, release_weights=True)
    for call in (model.state_dict, model.deoptimize, model.train):
        with pytest.raises(RuntimeError, match="wanted one that has them: load the model again"):
            call()


def test_what_int8_refuses(encoder: ImageEncoder) -> None:
    with pytest.raises(
        ValueError, match=r"release_weights: got True with dtype None, wanted torch\.int8"
    ):
        encoder.optimize(release_weights=True)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(
            ValueError, match=rf"dtype: got torch.int8 for {dtype} parameters on cpu"
        ):
            copy.deepcopy(encoder).to(dtype).optimize(torch.int8)
    with pytest.raises(ValueError, match="parameters on meta"):
        copy.deepcopy(encoder).to("meta").optimize(torch.int8)
    with pytest.raises(ValueError, match="optimize: got an encoder in training mode"):
        encoder.train().optimize(torch.int8)


def test_a_cpu_without_the_instructions_is_told(
    encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = run(copy.deepcopy(encoder))
    monkeypatch.setenv("REFSAM_CPU_INSTRUCTION_SET", "portable")
    found = run(encoder.optimize(torch.int8))
    assert "int8: this CPU has no instructions for 8-bit products" in caplog.text
    assert_near(found, wanted)


def test_the_whole_model() -> None:
    model = tiny_model()
    frame = torch.randint(0, 256, (1, 40, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        pixels, _ = model.preprocess(frame)
        before = model.encode_image(pixels).levels
        found = model.optimize(torch.int8).encode_image(pixels).levels
    assert 0 < (found - before).norm() <= TOLERANCE * before.norm()
