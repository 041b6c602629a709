"""The whole model: what may not change a mask, what must, what is trained, and what is refused."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from refsam import RefSAM, RefSAMConfig
from refsam.model import EncodedText, ImageFeatures, MaskOutput, TextPrompt
from refsam_kernels import use_backend
from tests.tiny_model import CONFIG, tiny_model

EXPRESSIONS = ["the red cup", "the small dog on the left of the blue car", "cat"]


@pytest.fixture(scope="module")
def model() -> RefSAM:
    return tiny_model()


@pytest.fixture(scope="module")
def image(model: RefSAM) -> ImageFeatures:
    """Features of two frames."""
    torch.manual_seed(1)
    with torch.no_grad():
        return model.encode_image(torch.randn(2, 3, 64, 64))


def one(image: ImageFeatures, index: int) -> ImageFeatures:
    part = slice(index, index + 1)
    return ImageFeatures(image.embedding[part], image.levels[:, part], image.grid)


def assert_same(found: MaskOutput, wanted: MaskOutput, tolerance: float = 0.0) -> None:
    for name in MaskOutput._fields:
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name


def rows(output: MaskOutput, index: Any) -> MaskOutput:
    return MaskOutput(*(value[index] for value in output))


@pytest.mark.parametrize(
    ("preset", "millions"), [("vit_b", 10.17), ("vit_l", 19.30), ("vit_h", 33.02)]
)
def test_learnable_parameters(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = RefSAM(RefSAMConfig.preset(preset))
    learnable = [p.numel() for p in model.parameters() if p.requires_grad]
    assert round(sum(learnable) / 1e6, 2) == millions


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "fallback"])
def test_padding_changes_no_bit(model: RefSAM, image: ImageFeatures, backend: str) -> None:
    encoded = model.text_encoder.encode(EXPRESSIONS)
    longest = int(encoded.lengths.max())
    padded = torch.full((3, longest + 5, encoded.tokens.shape[2]), torch.nan)
    for row, length in enumerate(encoded.lengths.tolist()):
        padded[row, :length] = encoded.tokens[row, :length]
    more = EncodedText(padded, encoded.lengths)
    image_index, track = torch.tensor([0, 1, 1]), torch.randn(3, 32)
    valid = torch.tensor([True, False, True])
    with use_backend(backend):
        wanted = model.decode(image, model.project_text(encoded), image_index, track, valid)
        found = model.decode(image, model.project_text(more), image_index, track, valid)
        prompt = model.project_text(encoded)
        words = torch.cat([prompt.words, torch.full((3, 4, 32), torch.nan)], dim=1)
        by_hand = TextPrompt(words, prompt.sentence, prompt.lengths)
        again = model.decode(image, by_hand, image_index, track, valid)
    assert_same(found, wanted)
    assert_same(again, wanted)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "fallback"])
def test_batch_composition_changes_only_rounding(
    model: RefSAM, image: ImageFeatures, backend: str
) -> None:
    image_index, track = torch.tensor([0, 1, 1]), torch.randn(3, 32)
    valid = torch.tensor([True, False, True])
    with use_backend(backend):
        text = model.project_text(model.text_encoder.encode(EXPRESSIONS))
        together = model.decode(image, text, image_index, track, valid)
        for row, expression in enumerate(EXPRESSIONS):
            alone = model.decode(
                one(image, int(image_index[row])),
                model.project_text(model.text_encoder.encode([expression])),
                None,
                track[row : row + 1] if valid[row] else None,
            )
            assert_same(rows(together, slice(row, row + 1)), alone, 1e-5)


@torch.no_grad()
def test_order_of_expressions_does_not_matter(model: RefSAM, image: ImageFeatures) -> None:
    text, image_index = model.encode_text(EXPRESSIONS), torch.tensor([0, 1, 1])
    order = [2, 0, 1]
    found = model.decode(image, text.select(order), image_index[order])
    assert_same(found, rows(model.decode(image, text, image_index), order), 1e-5)


@torch.no_grad()
def test_everything_that_should_matter_does(model: RefSAM, image: ImageFeatures) -> None:
    text, index, track = model.encode_text(["red cup"]), torch.tensor([0]), torch.randn(1, 32)
    logits = model.decode(image, text, index).logits
    others = {
        "expression": model.decode(image, model.encode_text(["blue dog"]), index),
        "frame": model.decode(image, text, torch.tensor([1])),
        "track token": model.decode(image, text, index, track),
        "intermediate levels": model.decode(
            image._replace(levels=image.levels.roll(1, dims=2)), text, index
        ),
    }
    for name, output in others.items():
        assert (output.logits - logits).abs().max() > 1e-3 * logits.abs().max(), name


@torch.no_grad()
def test_track_token_stands_right_behind_the_words(model: RefSAM, image: ImageFeatures) -> None:
    """Its place cannot matter to attention, so the token counts as one more word of the decoder alone."""
    text, track = model.encode_text(["red cup", "the dog"]).select([0]), torch.randn(1, 32)
    found = model.decode(one(image, 0), text, None, track)
    dense = model.dense_attention(
        image.levels[:, :1],
        torch.cat([text.sentence[:, None], text.words], dim=1),
        text.lengths + 1,
        torch.tensor([0]),
    )
    logits, iou, tokens = model.mask_decoder(
        image.embedding[:1] + dense,
        model.prompt_encoder.pe_layer(*image.grid),
        torch.cat([text.words, track[:, None]], dim=1),
        None,
        image.grid,
    )
    assert_same(
        found,
        MaskOutput(logits[:, 0], iou[:, 0], tokens[:, 0], model.tracking(tokens[:, 0], track)),
        1e-5,
    )


@torch.no_grad()
def test_invalid_track_tokens_are_not_seen(model: RefSAM, image: ImageFeatures) -> None:
    text, index = model.encode_text(EXPRESSIONS), torch.tensor([0, 1, 1])
    track = torch.full((3, 32), torch.nan)
    none_valid = torch.zeros(3, dtype=torch.bool)
    found = model.decode(image, text, index, track, none_valid)
    assert_same(found, model.decode(image, text, index), 1e-5)


@torch.no_grad()
def test_shapes_and_unit_vectors(model: RefSAM, image: ImageFeatures) -> None:
    text = model.encode_text(EXPRESSIONS)
    output = model.decode(image, text, torch.tensor([0, 1, 1]))
    assert output.logits.shape == (3, 16, 16) and output.iou.shape == (3,)
    assert output.object_token.shape == output.track_token.shape == (3, 32)
    assert image.levels.shape == (2, 2, 16, 32) and image.grid == (4, 4)
    for vectors in (image.levels, text.words, text.sentence):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))


def test_clip_is_differentiable_through_its_track_tokens(model: RefSAM) -> None:
    model.zero_grad()
    image = model.encode_image(torch.randn(2, 3, 64, 64))
    text = model.encode_text(EXPRESSIONS)
    first = model.decode(image, text, torch.zeros(3, dtype=torch.int64))
    second = model.decode(image, text, torch.ones(3, dtype=torch.int64), first.track_token)
    (
        second.logits.square().mean() + second.iou.sum() + second.track_token.square().sum()
    ).backward()
    unused = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None and "hypernetworks_mlps.0" not in name
    }
    # RefSAM takes mask 0; the other masks' hypernetworks are SAM's and only kept.
    assert all("output_hypernetworks_mlps" in name for name in unused)
    assert model.tracking.linear1.weight.grad.abs().sum() > 0
    model.zero_grad()


def frozen_model(**changes: Any) -> RefSAM:
    values: Mapping[str, Any] = {**CONFIG, "frozen": True, **changes}
    torch.manual_seed(0)
    return RefSAM(RefSAMConfig.from_dict(values))


def test_what_is_frozen_stays_in_eval_mode() -> None:
    model = frozen_model().train()
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "image_encoder",
        "cross_modal_mlp",
        "dense_attention",
        "mask_decoder",
        "tracking",
    }
    in_encoder = [n for n, p in model.image_encoder.named_parameters() if p.requires_grad]
    assert in_encoder and all("_Adapter." in name for name in in_encoder)
    assert not model.text_encoder.training and not model.image_encoder.neck.training
    assert not model.image_encoder.blocks[0].training
    assert model.mask_decoder.training and model.image_encoder.blocks[2].Space_Adapter.training
    assert all(not module.training for module in model.frozen_modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_unfrozen_model_trains_everything() -> None:
    model = frozen_model(frozen=False).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.frozen_modules() == [] and all(module.training for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 100), (100, 48), (480, 854), (1, 300), (64, 64), (7, 64)])
def test_preprocess_is_sams(model: RefSAM, size: tuple[int, int]) -> None:
    """Pillow's bilinear resize of 8-bit values, SAM's mean and standard deviation, zeros right and below."""
    noise = np.random.default_rng(0)
    frame = noise.integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels, sizes = model.preprocess(torch.from_numpy(frame)[None])
    scale = 64 / max(size)
    resized = (max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5)))
    assert sizes == (size, resized) and pixels.shape == (1, 3, 64, 64)
    shrunk = Image.fromarray(frame).resize(resized[::-1], Image.Resampling.BILINEAR)
    wanted = torch.from_numpy(np.asarray(shrunk).copy()).float()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    found = pixels[0, :, : resized[0], : resized[1]].permute(1, 2, 0) * std + mean
    assert (found - wanted).abs().max() <= 1.01  # one grey level: two ways to round
    assert not pixels[0, :, resized[0] :].any() and not pixels[0, :, :, resized[1] :].any()


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(1, 8, 8, 3), torch.zeros(8, 8, 3, dtype=torch.uint8)],
    ids=["float", "3d"],
)
def test_preprocess_rejects_other_frames(model: RefSAM, frames: Tensor) -> None:
    with pytest.raises(ValueError, match="wanted uint8 of shape"):
        model.preprocess(frames)
    with pytest.raises(ValueError, match="empty frames"):
        model.preprocess(torch.zeros(1, 0, 8, 3, dtype=torch.uint8))


@torch.no_grad()
def test_another_image_size_interpolates_the_positions(model: RefSAM) -> None:
    pixels, _ = model.preprocess(torch.zeros(1, 30, 50, 3, dtype=torch.uint8), image_size=96)
    image = model.encode_image(pixels)
    assert image.grid == (6, 6)
    assert model.decode(image, model.encode_text(["red cup"])).logits.shape == (1, 24, 24)


@torch.no_grad()
def test_decode_rejects_what_does_not_fit(model: RefSAM, image: ImageFeatures) -> None:
    text, index = model.encode_text(EXPRESSIONS), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="image_index: got None for 2 frames"):
        model.decode(image, text)
    with pytest.raises(ValueError, match=r"image_index: got shape \(2,\), wanted \(3,\)"):
        model.decode(image, text, index[:2])
    with pytest.raises(ValueError, match=r"track: got shape \(2, 32\), wanted \(3, 32\)"):
        model.decode(image, text, index, torch.zeros(2, 32))
    with pytest.raises(ValueError, match="track_valid"):
        model.decode(image, text, index, None, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="words, lengths"):
        TextPrompt(torch.zeros(2, 3, 32), torch.zeros(2, 32), torch.tensor([1, 4]))


@torch.no_grad()
def test_half_precision_stays_close(model: RefSAM) -> None:
    frames = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    half = tiny_model().to(torch.bfloat16)
    logits = [
        m.decode(m.encode_image(m.preprocess(frames)[0]), m.encode_text(["red cup"])).logits.float()
        for m in (model, half)
    ]
    # bfloat16 keeps 8 bits; a dozen layers lose some more.
    assert (logits[1] - logits[0]).abs().max() <= 0.15 * logits[0].abs().max()


def test_every_tensor_follows_the_model_to_its_device() -> None:
    """The meta device stands for any other: mixing it with the host's tensors is an error."""
    model = tiny_model().to("meta")
    pixels, _ = model.preprocess(torch.zeros(2, 40, 64, 3, dtype=torch.uint8))
    image, text = model.encode_image(pixels), model.encode_text(EXPRESSIONS)
    index = torch.tensor([0, 1, 1], device="meta")
    first = model.decode(image, text, index)
    valid = torch.tensor([True, False, True], device="meta")
    second = model.decode(image, text, index, first.track_token, valid)
    assert {value.device.type for value in (*image[:2], text.words, *second)} == {"meta"}


@torch.no_grad()
def test_compiles_into_one_graph(model: RefSAM) -> None:
    text, index, track = model.encode_text(EXPRESSIONS), torch.tensor([0, 1, 1]), torch.randn(3, 32)
    valid, pixels = torch.tensor([True, False, True]), torch.randn(2, 3, 64, 64)

    def step(pixels: Tensor, track: Tensor) -> Tensor:
        return model.decode(model.encode_image(pixels), text, index, track, valid).logits

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels, track), step(pixels, track))


def test_autocast_trains(model: RefSAM) -> None:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = model.encode_image(torch.randn(1, 3, 64, 64))
        text = model.encode_text(["red cup"])
        first = model.decode(image, text)
        second = model.decode(image, text, None, first.track_token)
    second.logits.float().square().mean().backward()
    gradient = model.image_encoder.blocks[0].attn.qkv.weight.grad
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()
    model.zero_grad()
