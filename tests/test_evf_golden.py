"""Equal to the outputs of EVF-SAM's own modules (golden files, see their README)."""

import json
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refsam.config import EVFConfig
from refsam.model import EVFSAM, ImageFeatures, TextPrompt
from refsam.model.beit3 import State, key_mask
from refsam.model.prompted_sam import DecodeInputs
from tests.golden import golden_folder, golden_weight, read_golden, relative_error

EVF_PREFIXES = {
    "beit3.": "mm_extractor.beit3.",
    "text_mlp.": "text_hidden_fcs.0.",
    "": "visual_model.",
}
TINY = {
    "image_encoder": {
        "image_size": 160,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "window_size": 4,
        "global_blocks": (1, 3),
        "adapter_ratio": 0,
    },
    "beit3": {
        "width": 64,
        "depth": 4,
        "num_heads": 4,
        "hidden": 128,
        "image_size": 64,
        "vocabulary_size": 100,
    },
}
TOLERANCE = 1e-5
BEIT3_TOLERANCE = 3e-6  # tells epsilons 1e-5 and 1e-6 apart
INDEX = torch.tensor([0, 0, 1, 1])
CASES = pytest.mark.parametrize(
    ("dtype", "calm"), [(torch.float64, False), (torch.float64, True), (torch.float32, True)]
)


def evf_name(ours: str) -> str:
    """The name that EVF-SAM's checkpoints have for a tensor."""
    prefix = next(prefix for prefix in EVF_PREFIXES if ours.startswith(prefix))
    return EVF_PREFIXES[prefix] + ours.removeprefix(prefix)


@cache
def golden() -> dict[str, Tensor]:
    return read_golden("evf_tiny.npz")


def golden_model(dtype: torch.dtype, *, calm: bool = False) -> EVFSAM:
    """The tiny model with the golden weights; calm: with the smaller cross attention weights of `calm_*`."""
    model = EVFSAM(EVFConfig(**TINY))
    state = {}
    for name, tensor in model.state_dict().items():
        official, shape = evf_name(name), tuple(tensor.shape)
        is_cross = "token_to_image" in official or "image_to_token" in official
        state[name] = golden_weight(official, shape, calm=calm and is_cross)
    model.load_state_dict(state)
    return model.to(dtype).eval()


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The stored pixels and BEiT-3's views of both frames."""
    return tuple(  # type: ignore[return-value]
        torch.stack([golden()[f"{name}_{frame}"] for frame in (0, 1)]).to(dtype)
        for name in ("sam_in", "beit_in")
    )


def prompts(model: EVFSAM) -> TextPrompt:
    """Both expressions for each of the two frames, padded."""
    ids, lengths = golden()["ids"], golden()["keep"].sum(1)
    return model.embed_text(ids.repeat(2, 1), lengths.repeat(2))


def to_frame(logits: Tensor, frame: int) -> Tensor:
    """Low-resolution logits at the frame's size, by SAM's two resizes."""
    height, width = golden()[f"resized_{frame}"].shape[:2]
    square = F.interpolate(logits[None], (160, 160), mode="bilinear", align_corners=False)
    cropped = square[..., :height, :width]
    size = golden()[f"frame_{frame}"].shape[:2]
    return F.interpolate(cropped, size, mode="bilinear", align_corners=False)[0]


def error(found: Tensor, name: str) -> float:
    return relative_error(found.float(), golden()[name])


def test_preprocessing() -> None:
    model = golden_model(torch.float32)
    for frame in (0, 1):
        image = golden()[f"frame_{frame}"]
        pixels, size = model.preprocess(image[None])
        resized = pixels[0] * model.pixel_std + model.pixel_mean
        height, width = size.resized
        whole = resized[:, :height, :width].permute(1, 2, 0).round().to(torch.uint8)
        assert torch.equal(whole, golden()[f"resized_{frame}"])
        assert error(pixels[0], f"sam_in_{frame}") == 0
        assert error(model.view(image[None])[0], f"beit_in_{frame}") <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_beit3(dtype: torch.dtype) -> None:
    model = golden_model(dtype)
    text, beit3 = prompts(model), model.beit3
    patches = beit3.embed_patches(inputs(dtype)[1])
    feature = beit3(patches, text.words, text.lengths, INDEX)
    assert error(feature, "feat") <= BEIT3_TOLERANCE
    assert error(model.text_mlp(feature), "token") <= BEIT3_TOLERANCE

    keep = golden()["keep"].bool().repeat(2, 1)[..., None]
    state = State(patches[INDEX], torch.where(keep, text.words, 0))
    is_key = key_mask(17, 9, text.lengths)
    for index, layer in enumerate(beit3.layers()):
        wanted = golden()["beit_hidden"][index]
        assert relative_error(torch.cat(state, 1).float(), wanted) <= BEIT3_TOLERANCE
        state = beit3.run_layer(layer, state, is_key)
    last = torch.cat(state, 1).float()
    assert relative_error(last, golden()["beit_hidden"][4]) <= BEIT3_TOLERANCE
    norms = beit3.encoder.layer_norm
    out = torch.cat([norms["A"](state.patches), norms["B"](state.words)], 1)
    assert error(out, "beit_out") <= BEIT3_TOLERANCE


@CASES
@torch.no_grad()
def test_masks(dtype: torch.dtype, calm: bool) -> None:
    model, prefix = golden_model(dtype, calm=calm), "calm_" if calm else ""
    image = model.encode_image(*inputs(dtype))
    grid = image.embedding.transpose(1, 2).unflatten(2, (10, 10))
    assert error(grid, "image_embedding") <= TOLERANCE
    pe = model.prompt_encoder.pe_layer(10, 10, dtype).transpose(1, 2).unflatten(2, (10, 10))
    assert error(pe, "image_pe") <= TOLERANCE
    output = model.decode(image, prompts(model), INDEX)
    assert error(output.logits[:, None], f"{prefix}low") <= TOLERANCE
    assert error(output.iou[:, None], f"{prefix}iou") <= TOLERANCE
    for frame in (0, 1):
        rows = output.logits[2 * frame : 2 * frame + 2]
        assert error(to_frame(rows, frame), f"{prefix}logits_{frame}") <= TOLERANCE


@CASES
@torch.no_grad()
def test_padding_attended_on_purpose(dtype: torch.dtype, calm: bool) -> None:
    """With the padding read as words the result is that of the original's `inference()` on a padded batch."""
    model, prefix = golden_model(dtype, calm=calm), "calm_" if calm else ""
    image, index = model.encode_image(*inputs(dtype)), torch.tensor([0, 1])
    text = model.embed_text(golden()["ids"][:1].repeat(2, 1), torch.tensor([9, 9]))
    feature = model.beit3(image.patches, text.words, text.lengths, index)
    assert error(feature, "feat_unmasked") <= BEIT3_TOLERANCE
    output = model.decode(image, text, index)
    assert error(output.logits[:, None], f"{prefix}low_unmasked") <= TOLERANCE
    assert error(output.iou[:, None], f"{prefix}iou_unmasked") <= TOLERANCE


@CASES
@torch.no_grad()
def test_all_masks_of_the_decoder(dtype: torch.dtype, calm: bool) -> None:
    model, prefix = golden_model(dtype, calm=calm), "calm_" if calm else ""
    image = model.encode_image(*inputs(dtype))
    text = prompts(model).select([1, 3])
    prompted = model.prompt(DecodeInputs(image, text, torch.tensor([0, 1]), None, None))
    pe = model.prompt_encoder.pe_layer(10, 10, dtype)
    decoded = model.mask_decoder(prompted.image, pe, prompted.sparse, None, image.grid, 4)
    logits, iou = decoded[0][:, 1:], decoded[1][:, 1:]
    assert error(logits, f"{prefix}low_multi") <= TOLERANCE
    assert error(iou, f"{prefix}iou_multi") <= TOLERANCE
    for frame in (0, 1) if calm else ():
        best = logits[frame, iou[frame].argmax()][None]
        assert error(to_frame(best, frame), f"calm_logits_multi_{frame}") <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_padding_changes_nothing(dtype: torch.dtype) -> None:
    model = golden_model(dtype, calm=True)
    image = model.encode_image(*inputs(dtype))
    together = model.decode(image, prompts(model), INDEX)
    for row, index in enumerate(INDEX.tolist()):
        own = ImageFeatures(
            image.embedding[index, None],
            image.levels[:, index, None],
            image.grid,
            image.patches[index, None],
        )
        alone = model.decode(own, prompts(model).select([row]))
        for name in ("logits", "iou"):
            found, wanted = getattr(together, name)[row], getattr(alone, name)[0]
            assert relative_error(found, wanted) <= TOLERANCE


def test_names_and_shapes_of_the_real_models() -> None:
    lists = json.loads((golden_folder() / "evf_names_huge_large.json").read_text())
    large = {name: tuple(shape) for name, shape in lists["huge_large"]["parameters"]}
    base = {name: tuple(shape) for name, shape in lists["base_extractor"]["parameters"]}
    kept = {k: v for k, v in large.items() if k.startswith("visual_model.")}
    beit3_base = {"width": 768, "depth": 12, "num_heads": 12, "hidden": 3072}
    check_names(EVFConfig(), large)
    check_names(EVFConfig(beit3=beit3_base), kept | base)  # type: ignore[arg-type]


def check_names(config: EVFConfig, wanted: dict[str, tuple[int, ...]]) -> None:
    from refsam.checkpoint import evf

    expected = EVFSAM.expected_tensors(config).items()
    ours = {evf_name(name): tuple(tensor.shape) for name, tensor in expected}
    ours.pop("visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")
    unused = {name for name in wanted if evf.is_unused(name)}
    assert ours == {name: shape for name, shape in wanted.items() if name not in unused}
