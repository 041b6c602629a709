"""optimize() on tiny random SAMs of segment-anything, transformers and timm: same outputs, same gradients, and back."""

import copy
import importlib.util
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels.integrations import optimize
from tests.kernels.operator_checks import assert_same_gradients
from tests.sam_modeling import load_sam_modeling, randomise, sam_image_encoder
from tests.timm_modeling import timm_image_encoder, torchvision_to_import

# As optimize() states it, of the largest value; gradients add up more terms.
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def sam_encoder(grid: int = 8, **changes: Any) -> nn.Module:
    """segment-anything's encoder: a windowed block, whose windows stick out of the grid, and a global one."""
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 3, "out_chans": 16}
    sizes |= {"img_size": 4 * grid, "patch_size": 4, "global_attn_indexes": (1,)}
    return sam_image_encoder(**(sizes | changes))


def sam(grid: int = 8) -> nn.Module:
    """segment-anything's whole model."""
    modeling = load_sam_modeling()
    prompts = modeling.PromptEncoder(
        embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(4 * grid, 4 * grid), mask_in_chans=4
    )  # fmt: skip
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=32)
    decoder = modeling.MaskDecoder(
        transformer_dim=32, transformer=transformer, iou_head_hidden_dim=32
    )
    return randomise(modeling.Sam(sam_encoder(grid, out_chans=32), prompts, decoder))


def transformers_encoder(
    grid: int = 8, attention: str = "sdpa", model: str = "SamVisionModel", **changes: Any
) -> nn.Module:
    """transformers' image encoder of the same sizes; its import takes seconds."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=4 * grid, patch_size=4,
        window_size=3, global_attn_indexes=[1], **changes,
    )  # fmt: skip
    if model == "SamVisionModel":
        made = transformers.SamVisionModel._from_config(config, attn_implementation=attention)
        return randomise(made)
    config.output_channels, config.num_pos_feats = 32, 16
    prompts = {"hidden_size": 32, "image_size": 4 * grid, "patch_size": 4, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 32,
    }
    whole = transformers.SamConfig(
        vision_config=config, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    return randomise(transformers.SamModel._from_config(whole, attn_implementation=attention))


def timm_encoder(grid: int = 8, **changes: Any) -> nn.Module:
    """timm's image encoder of the same sizes."""
    if not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed: pip install --no-deps timm")
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 3, "neck_chans": 16}
    sizes |= {"img_size": 4 * grid, "patch_size": 4, "global_attn_indexes": (1,)}
    return timm_image_encoder(**(sizes | changes))


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "segment_anything": sam_encoder,
    "transformers_sdpa": transformers_encoder,
    "transformers_eager": lambda grid=8: transformers_encoder(grid, "eager"),
    "timm": timm_encoder,
}
each_encoder = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS.keys())


def pixels_of(grid: int = 8) -> Tensor:
    return torch.randn(2, 3, 4 * grid, 4 * grid, generator=torch.Generator().manual_seed(1))


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    output = model(pixels)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=tolerance * float(wanted.detach().abs().max())
    )


# 64 tokens a side is SAM's default; the others are those of 512, 640 and 768 pixels, and one window and less.
@pytest.mark.parametrize(
    "grid", [2, 3, 8, 32, 40, *(pytest.param(n, marks=pytest.mark.slow) for n in (48, 64))]
)
@each_encoder
@torch.inference_mode()
def test_features_are_the_original_ones_and_undo_restores_their_bits(
    make: Callable[..., nn.Module], grid: int
) -> None:
    model, pixels = make(grid), pixels_of(grid)
    wanted, state = features(model, pixels), set(model.state_dict())
    handle = optimize(model)
    found = features(model, pixels)
    assert_close(found, wanted)
    assert set(model.state_dict()) == state
    handle.undo()
    assert torch.equal(features(model, pixels), wanted)


@each_encoder
def test_gradients_are_the_original_ones(make: Callable[..., nn.Module]) -> None:
    model, pixels = make().train(), pixels_of()
    weights = torch.randn(features(model, pixels).shape)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        (features(model, pixels) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    with optimize(model):
        found = gradients()
    assert wanted.keys() == {name for name, _ in model.named_parameters()}
    assert_same_gradients(found, wanted, GRADIENT_TOLERANCE)  # those of k's bias are zero


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@each_encoder
@torch.inference_mode()
def test_bfloat16_is_at_most_twice_as_far_off(
    make: Callable[..., nn.Module], autocast: bool
) -> None:
    model, pixels = make(), pixels_of()
    exact = features(model, pixels)
    if not autocast:
        model, pixels = model.bfloat16(), pixels.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs = features(model, pixels)
        optimize(model)
        ours = features(model, pixels)
    assert ours.dtype == theirs.dtype
    assert (ours.float() - exact).abs().max() <= 2 * (theirs.float() - exact).abs().max()


@each_encoder
def test_the_operator_runs(make: Callable[..., nn.Module]) -> None:
    model = make()
    optimize(model)
    with torch.profiler.profile() as profile, torch.no_grad():
        features(model, pixels_of())
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["refsam_kernels::rel_pos_attention"] == 2
    assert not any("scaled_dot_product" in name for name in calls)


@each_encoder
@torch.no_grad()
def test_copies_compute_with_their_own_weights(make: Callable[..., nn.Module]) -> None:
    model, pixels = make(), pixels_of()
    optimize(model)
    before = features(model, pixels)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in (*twins, torch.load(saved, weights_only=False)):
        assert torch.equal(features(twin, pixels), before)
        for name, parameter in twin.named_parameters():
            if "rel_pos" in name:
                parameter.mul_(2)
        assert not torch.equal(features(twin, pixels), before)
    assert torch.equal(features(model, pixels), before)


@each_encoder
@torch.no_grad()
def test_hooks_of_every_module_run(make: Callable[..., nn.Module]) -> None:
    model, called = make(), set()
    optimize(model)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    features(model, pixels_of())
    uncalled = ("q_norm", "k_norm", "attn_drop")  # timm's, which do nothing between qkv and proj
    assert called == {
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.ModuleList) and not name.endswith(uncalled)
    }


def make_optimized(make: Callable[..., nn.Module]) -> nn.Module:
    """The model, optimized already."""
    model = make()
    optimize(model)
    return model


@pytest.mark.parametrize("make", [sam_encoder, transformers_encoder, timm_encoder])
def test_compiles_without_a_break(make: Callable[..., nn.Module]) -> None:
    model = make()
    optimize(model)
    layers = model.blocks if hasattr(model, "blocks") else model.vision_encoder.layers
    tokens = torch.randn(1, 8, 8, 32)
    for layer in layers:
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert_close(compiled(tokens), layer(tokens))


def test_transformers_checkpoints_activations_and_returns_hidden_states() -> None:
    model, pixels = transformers_encoder().train(), pixels_of()
    wanted = model(pixels, output_hidden_states=True).hidden_states
    with optimize(model):
        found = model(pixels, output_hidden_states=True).hidden_states
        assert len(found) == len(wanted) == 3
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs)
        model.zero_grad()
        features(model, pixels).sum().backward()
        plain = model.vision_encoder.pos_embed.grad.clone()
        model.zero_grad()
        model.gradient_checkpointing_enable()
        features(model, pixels).sum().backward()
    assert_close(model.vision_encoder.pos_embed.grad, plain)


def assert_masks_equal(found: Tensor, wanted: Tensor, logits: Tensor) -> None:
    """Masks (bool) equal but where the original's logits are about zero, relative to the largest."""
    assert found.dtype == torch.bool
    assert found.shape == wanted.shape
    certain = logits.abs() > 1e-4 * logits.abs().max()
    assert certain.float().mean() > 0.99
    assert torch.equal(found[certain], wanted[certain])


def calls_of(run: Callable[[], object]) -> dict[str, int]:
    """How often each operator of this library runs."""
    with torch.profiler.profile() as profile:
        run()
    return {
        event.key.removeprefix("refsam_kernels::"): event.count
        for event in profile.key_averages()
        if event.key.startswith("refsam_kernels::")
    }


def points(count: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 2, 2) * 32, torch.ones(count, 2)


@pytest.mark.parametrize("multimask", [False, True])
@torch.inference_mode()
def test_sam_from_points_to_masks(multimask: bool) -> None:
    model = sam()
    coordinates, labels = points()
    record = {"image": torch.rand(3, 22, 32) * 255, "original_size": (20, 30)}
    batch = [record | {"point_coords": coordinates, "point_labels": labels}]
    (wanted,) = model(batch, multimask_output=multimask)
    logits = model.postprocess_masks(wanted["low_res_logits"], (22, 32), (20, 30))
    optimize(model)
    calls = calls_of(lambda: batch.append(model(batch[:1], multimask_output=multimask)[0]))
    found = batch[1]
    own = {"rel_pos_attention": 2, "mask_upscale": 1, "mask_postprocess": 1}
    assert calls == own | {"token_image_attention": 5}
    assert found.keys() == wanted.keys()
    assert_close(found["low_res_logits"], wanted["low_res_logits"], 1e-4)
    assert_close(found["iou_predictions"], wanted["iou_predictions"], 1e-4)
    assert_masks_equal(found["masks"], wanted["masks"], logits)


@torch.inference_mode()
def test_sam_predictor_from_points_to_masks() -> None:
    with torchvision_to_import():
        from segment_anything.predictor import SamPredictor
    predictor, image = SamPredictor(sam()), torch.rand(1, 3, 22, 32) * 255
    prompts = points()
    predictor.set_torch_image(image, (20, 30))
    wanted, iou, low = predictor.predict_torch(*prompts)
    logits = predictor.predict_torch(*prompts, return_logits=True)[0]
    with optimize(predictor):
        predictor.set_torch_image(image, (20, 30))
        masks, our_iou, our_low = predictor.predict_torch(*prompts)
        our_logits = predictor.predict_torch(*prompts, return_logits=True)[0]
        predictor.reset_image()
        with pytest.raises(RuntimeError, match="An image must be set"):
            predictor.predict_torch(*prompts)
    assert_masks_equal(masks, wanted, logits)
    for found, exact in ((our_iou, iou), (our_low, low), (our_logits, logits)):
        assert_close(found, exact, 1e-4)
    assert "predict_torch" not in vars(predictor)


@pytest.mark.parametrize("multimask", [False, True])
@torch.inference_mode()
def test_transformers_sam_from_points_to_masks(multimask: bool) -> None:
    model = transformers_encoder(model="SamModel")
    inputs = {"pixel_values": pixels_of(), "input_points": torch.rand(2, 3, 2, 2) * 32}
    inputs["multimask_output"] = multimask
    wanted = model(**inputs)
    optimize(model)
    outputs: list[Any] = []
    calls = calls_of(lambda: outputs.append(model(**inputs)))
    assert calls == {"rel_pos_attention": 2, "mask_upscale": 1, "token_image_attention": 4}
    assert_close(outputs[0].pred_masks, wanted.pred_masks, 1e-4)
    assert_close(outputs[0].iou_scores, wanted.iou_scores, 1e-4)


@torch.inference_mode()
def test_transformers_processor_makes_masks() -> None:
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    processor = SamImageProcessorPil(pad_size={"height": 64, "width": 64})
    masks = [torch.randn(2, 3, 16, 16), torch.randn(1, 3, 16, 16)]
    sizes = {
        "original_sizes": torch.tensor([[30, 50], [80, 40]]),
        "reshaped_input_sizes": torch.tensor([[38, 64], [64, 32]]),
    }
    wanted = processor.post_process_masks(masks, **sizes, mask_threshold=0.2)
    logits = processor.post_process_masks(masks, **sizes, binarize=False)
    with optimize(processor):
        found = processor.post_process_masks(masks, **sizes, mask_threshold=0.2)
        unchanged = processor.post_process_masks(masks, **sizes, binarize=False)
        of_arrays = processor.post_process_masks([m.numpy() for m in masks], **sizes)
    for ours, theirs, exact, same in zip(found, wanted, logits, unchanged, strict=True):
        assert_masks_equal(ours, theirs, exact - 0.2)
        assert torch.equal(same, exact)
    assert [mask.shape for mask in of_arrays] == [mask.shape for mask in wanted]
    assert "post_process_masks" not in vars(processor)


def decoder_inputs(library: str) -> tuple[nn.Module, dict[str, Any]]:
    """A mask decoder and what it takes for two prompts; its image embedding wants gradients."""
    image = torch.randn(1, 32, 8, 8, requires_grad=True)
    if library == "segment_anything":
        names = ("image_embeddings", "image_pe", "sparse_prompt_embeddings")
        return sam().mask_decoder, dict(
            zip(names, (image, torch.randn(1, 32, 8, 8), torch.randn(2, 3, 32)), strict=True),
            dense_prompt_embeddings=torch.randn(2, 32, 8, 8),
            multimask_output=True,
        )
    names = ("image_embeddings", "image_positional_embeddings", "sparse_prompt_embeddings")
    return transformers_encoder(model="SamModel").mask_decoder, dict(
        zip(names, (image, torch.randn(1, 32, 8, 8), torch.randn(1, 2, 3, 32)), strict=True),
        dense_prompt_embeddings=torch.randn(1, 32, 8, 8),
        multimask_output=True,
    )


@pytest.mark.parametrize("library", ["segment_anything", "transformers"])
def test_decoder_trains_as_before(library: str) -> None:
    decoder, inputs = decoder_inputs(library)
    image = inputs["image_embeddings"]

    def gradients() -> dict[str, Tensor]:
        decoder.zero_grad()
        image.grad = None
        masks, iou = decoder(**inputs)
        (masks.square().sum() + iou.sum()).backward()
        named = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        return {name: grad.clone() for name, grad in {**named, "image": image.grad}.items()}

    wanted = gradients()
    with optimize(decoder):
        found = gradients()
    assert "forward" not in vars(decoder)
    # A hypernetwork that no wanted mask needs has no gradient; the original gives it zeros.
    zeros = {name: torch.zeros_like(grad) for name, grad in wanted.items() if name not in found}
    assert_same_gradients(found | zeros, wanted, GRADIENT_TOLERANCE)


def with_adapter() -> nn.Module:
    model = sam_encoder()
    model.blocks[0].Space_Adapter = nn.Linear(32, 32)
    return model


def with_other_encoder() -> nn.Module:
    """As MobileSAM has it: segment-anything's `Sam` around another encoder."""
    model = sam()
    model.image_encoder = nn.Conv2d(3, 32, 4)
    return model


def of_class(name: str) -> nn.Module:
    """A module of a class of this name."""
    return type(name, (nn.Module,), {})()


def with_part(attribute: str, class_name: str) -> nn.Module:
    """segment-anything's `Sam` around a part of another library."""
    model = sam()
    setattr(model, attribute, of_class(class_name))
    return model


def of_another_version() -> nn.Module:
    """A decoder whose method takes something that is not known here."""
    decoder = sam().mask_decoder
    decoder.__class__ = type(
        "MaskDecoder", (type(decoder),), {"predict_masks": lambda self, image_embeddings, prompts: None}
    )  # fmt: skip
    return decoder


def with_tanh() -> nn.Module:
    model = transformers_encoder(model="SamModel")
    model.mask_decoder.activation = nn.GELU("tanh")
    return model


def without_positions() -> nn.Module:
    return load_sam_modeling().ImageEncoderViT(
        img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=2, out_chans=16
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(2, 2), "model: got a Linear, wanted one of Sam, ImageEncoderViT"),
        (lambda: "sam", "model: got a str, wanted one of Sam"),
        (with_adapter, r"model.blocks.0: got members \['Space_Adapter', 'attn'"),
        (with_other_encoder, "model.image_encoder: got a Conv2d, wanted ImageEncoderViT"),
        (
            lambda: with_part("image_encoder", "TinyViT"),
            r"got a TinyViT, wanted ImageEncoderViT \(MobileSAM .* give model.mask_decoder to",
        ),
        (lambda: of_class("SAM2Base"), "model: got a SAM2Base, wanted one of Sam, ImageEncoderViT"),
        (
            lambda: of_class("Sam2Model"),
            "model: got a Sam2Model, wanted one of Sam, ImageEncoderViT",
        ),
        (
            lambda: of_class("SamHQModel"),
            "got a SamHQModel, wanted .*or another model with SAM's blocks",
        ),
        (
            of_another_version,
            "model.predict_masks: got parameters image_embeddings, prompts, wanted .*: this version of",
        ),
        (
            with_tanh,
            "model.mask_decoder, its activation: got GELU.approximate='tanh'., wanted the exact",
        ),
        (
            lambda: timm_encoder(qk_norm=True),
            "blocks.0.attn.q_norm: got a LayerNorm, wanted qk_norm=F",
        ),
        (lambda: timm_encoder(attn_drop_rate=0.1), "blocks.0.attn.attn_drop: got 0.1, wanted 0"),
        (without_positions, "model.blocks.0.attn.use_rel_pos: got False, wanted True"),
        (lambda: make_optimized(sam_encoder), "model.blocks.0.forward: got one that was replaced"),
        (
            lambda: transformers_encoder(attention="eager", attention_dropout=0.1),
            "layers.0.attn.dropout: got 0.1, wanted 0",
        ),
    ],
)
def test_optimize_rejects_with_reasons(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimize(make())


@torch.no_grad()
def test_a_sam_with_another_decoder_keeps_it() -> None:
    """As SAM-HQ's and EVF-SAM's: SAM's image encoder before a decoder of their own."""
    model, pixels = with_part("mask_decoder", "MaskDecoderHQ"), pixels_of()
    wanted = model.image_encoder(pixels)
    optimize(model)
    assert_close(model.image_encoder(pixels), wanted)
    assert "forward" not in vars(model)


def test_a_decoder_that_computes_something_else_is_refused() -> None:
    """As a copy of segment-anything may: the same members and arguments, another result."""
    model = sam()
    kind = type(model.mask_decoder)

    def predict_masks(self: Any, *embeddings: Tensor) -> tuple[Tensor, Tensor]:
        masks, iou = kind.predict_masks(self, *embeddings)
        return masks.sigmoid(), iou

    predict_masks.__signature__ = inspect.signature(kind.predict_masks)  # type: ignore[attr-defined]
    model.mask_decoder.__class__ = type("MaskDecoder", (kind,), {"predict_masks": predict_masks})
    with pytest.raises(
        ValueError, match=r"model\.mask_decoder: computes something else than SAM's"
    ):
        optimize(model)
    optimize(model, check=False)


def test_a_refused_model_is_unchanged() -> None:
    model, pixels = sam_encoder(), pixels_of()
    model.blocks[1].attn.use_rel_pos = False
    wanted = model(pixels)
    with pytest.raises(ValueError):
        optimize(model)
    assert torch.equal(model(pixels), wanted)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_readme_says_what_works() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    section = text.split("## Make your own SAM faster")[1]
    code = section.split("```python\n")[1].split("```")[0]
    model, pixels = sam(), pixels_of()
    wanted = model.image_encoder(pixels)
    names = {"sam": model, "pixels": pixels}
    exec(code, names)
    assert_close(names["features"], wanted)
    assert torch.equal(model.image_encoder(pixels), wanted)


def test_undo_repeats_and_respects_later_changes() -> None:
    model = sam_encoder()
    handle = optimize(model)
    handle.undo()
    handle.undo()
    handle = optimize(model)
    model.blocks[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"model\.blocks\.0\.forward: got a method replaced after"):
        handle.undo()
    assert "forward" in vars(model.blocks[1])
