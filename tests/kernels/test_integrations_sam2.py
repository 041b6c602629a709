"""optimize() on tiny random mask decoders of SAM 2, SAM 3's tracker and EdgeTAM, and on their processors."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels.integrations import optimize
from tests.kernels.encoder_models import processor_of
from tests.kernels.operator_checks import assert_same_gradients
from tests.kernels.test_integrations import (
    GRADIENT_TOLERANCE,
    assert_close,
    assert_masks_equal,
    calls_of,
)
from tests.sam_modeling import randomise

pytest.importorskip("transformers")
LIBRARIES = {
    "sam2": "Sam2", "sam2_video": "Sam2Video", "sam3_tracker": "Sam3Tracker", "sam3_tracker_video": "Sam3TrackerVideo",
    "edgetam": "EdgeTam", "edgetam_video": "EdgeTamVideo",
}  # fmt: skip
each_library = pytest.mark.parametrize("library", LIBRARIES)


def make_decoder(library: str, dynamic: bool = False) -> Any:
    folder, name = f"transformers.models.{library}", LIBRARIES[library]
    configuration = importlib.import_module(f"{folder}.configuration_{library}")
    config = getattr(configuration, f"{name}MaskDecoderConfig")(
        hidden_size=32, mlp_dim=32, num_attention_heads=4, iou_head_hidden_dim=32, dynamic_multimask_via_stability=dynamic
    )  # fmt: skip
    config._attn_implementation = "eager"
    modeling = importlib.import_module(f"{folder}.modeling_{library}")
    return randomise(getattr(modeling, f"{name}MaskDecoder")(config))


def inputs_of(images: int = 2, prompts: int = 3, *, grad: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    return {
        "image_embeddings": normal(images, 32, 6, 5),
        "image_positional_embeddings": normal(images, 32, 6, 5),
        "sparse_prompt_embeddings": normal(images, prompts, 2, 32),
        "dense_prompt_embeddings": normal(images, 32, 6, 5),
        "high_resolution_features": [normal(images, 4, 24, 20), normal(images, 8, 12, 10)],
    }


@each_library
@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_masks_scores_and_tokens_are_the_original_ones(library: str, images: int) -> None:
    decoder, inputs = make_decoder(library), inputs_of(images)
    for multimask in (False, True):
        wanted = decoder(**inputs, multimask_output=multimask)
        found: list[Any] = []
        with optimize(decoder):
            run = lambda: found.extend(decoder(**inputs, multimask_output=multimask))  # noqa: B023, E731
            assert calls_of(run) == {"mask_upscale": 1, "token_image_attention": 4}
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs, 1e-4)


@torch.no_grad()
def test_the_stable_mask_is_chosen_as_before() -> None:
    decoder, inputs = make_decoder("sam2_video", dynamic=True), inputs_of()
    for delta in (0.0, 100.0):  # every mask is stable, none is
        decoder.dynamic_multimask_stability_delta = delta
        wanted = decoder(**inputs, multimask_output=False)
        with optimize(decoder):
            found = decoder(**inputs, multimask_output=False)
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("multimask", [False, True])
def test_trains_as_before(multimask: bool) -> None:
    decoder = make_decoder("sam2").train()

    def gradients() -> dict[Any, Tensor]:
        decoder.zero_grad()
        inputs = inputs_of(grad=True)
        masks, iou, *_ = decoder(**inputs, multimask_output=multimask)
        (masks.square().sum() + iou.sum()).backward()
        tensors = [*inputs.pop("high_resolution_features"), *inputs.values(), *decoder.parameters()]
        return {i: x.grad.clone() for i, x in enumerate(tensors) if x.grad is not None}

    wanted = gradients()
    with optimize(decoder):
        found = gradients()
    assert_same_gradients(found, wanted, GRADIENT_TOLERANCE)


@torch.no_grad()
def test_hooks_and_similarities_are_left_to_the_blocks_own_code() -> None:
    decoder, inputs = make_decoder("sam2"), inputs_of(1, 1)
    options: dict[str, Any] = {
        "multimask_output": True,
        "attention_similarity": torch.randn(1, 1, 1, 30),
    }
    wanted = decoder(**inputs, **options)
    seen: list[int] = []
    with optimize(decoder):
        found = decoder(**inputs, **options)
        for layer in decoder.transformer.layers:
            layer.cross_attn_image_to_token.q_proj.register_forward_hook(lambda *_: seen.append(1))
        decoder(**inputs, multimask_output=True)
    assert len(seen) == 2
    assert_close(found[0], wanted[0], 1e-4)


def test_a_changed_decoder_is_refused_in_words() -> None:
    decoder = make_decoder("sam2")
    decoder.gate = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model: got members .*'gate'"):
        optimize(decoder)


@pytest.mark.parametrize("library", ["sam2", "sam3"])
def test_processors_make_masks(library: str) -> None:
    processor = processor_of(library)
    masks = [torch.randn(2, 3, 16, 16), torch.randn(1, 3, 16, 16)]
    sizes = torch.tensor([[30, 50], [80, 41]])
    wanted = processor.post_process_masks(masks, sizes, mask_threshold=0.2)
    logits = processor.post_process_masks(masks, sizes, binarize=False)
    with optimize(processor):
        found: list[Any] = []
        run = lambda: found.extend(processor.post_process_masks(masks, sizes, mask_threshold=0.2))  # noqa: E731
        assert calls_of(run) == {"mask_postprocess": 2}
        unchanged = processor.post_process_masks(masks, sizes, binarize=False)
        arrays = processor.post_process_masks([mask.numpy() for mask in masks], sizes.tolist())
        oblong = processor.post_process_masks([torch.ones(1, 1, 8, 4)], [(9, 9)])
    for ours, theirs, exact, same in zip(found, wanted, logits, unchanged, strict=True):
        assert_masks_equal(ours, theirs, exact - 0.2)
        assert torch.equal(same, exact)
    assert [mask.shape for mask in arrays] == [mask.shape for mask in wanted]
    assert oblong[0].all()


@torch.no_grad()
def test_a_model_that_holds_a_decoder_is_served() -> None:
    """As `Sam2Model`, whose image encoder is another."""
    decoder, inputs = make_decoder("edgetam"), inputs_of(1, 1)
    model = torch.nn.ModuleDict({"vision_encoder": torch.nn.Linear(2, 2), "mask_decoder": decoder})
    wanted = decoder(**inputs, multimask_output=True)
    with optimize(model) as handle:
        assert (
            repr(handle) == "Optimization(3 methods replaced)"
        )  # the decoder's and its two blocks'
        assert_close(decoder(**inputs, multimask_output=True)[0], wanted[0], 1e-4)
