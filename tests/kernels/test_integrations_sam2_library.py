"""optimize() on stand-ins for the `sam2` library's mask decoder, predictor and generator."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels.integrations import optimize
from tests.kernels import sam2_modeling as sam2
from tests.kernels.operator_checks import assert_same_gradients
from tests.kernels.test_integrations import (
    GRADIENT_TOLERANCE,
    assert_close,
    assert_masks_equal,
    calls_of,
)


@pytest.mark.parametrize("high_resolution", [True, False])
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize(
    ("images", "prompts", "repeat"), [(1, 1, False), (3, 3, False), (1, 3, True)]
)
@torch.no_grad()
def test_masks_scores_and_tokens_are_the_original_ones(
    high_resolution: bool, scores: bool, images: int, prompts: int, repeat: bool
) -> None:
    decoder = sam2.mask_decoder(high_resolution, scores)
    inputs = sam2.decoder_inputs(images, prompts, repeat)
    if not high_resolution:
        inputs["high_res_features"] = None
    for multimask in (False, True):
        wanted = decoder(multimask, **inputs)
        with optimize(decoder):
            found = decoder(multimask, **inputs)
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs, 1e-4)
    assert torch.equal(decoder(True, **inputs)[0], wanted[0])


def test_trains_as_before() -> None:
    decoder = sam2.mask_decoder().train()

    def gradients() -> dict[Any, Tensor]:
        decoder.zero_grad()
        inputs = sam2.decoder_inputs(2, 2, False, grad=True)
        masks, iou, _, score = decoder(True, **inputs)
        (masks.square().sum() + iou.sum() + score.sum()).backward()
        given = [each for each in inputs.values() if isinstance(each, Tensor)]
        tensors = [*given, *inputs["high_res_features"], *decoder.parameters()]
        return {i: x.grad.clone() for i, x in enumerate(tensors) if x.grad is not None}

    wanted = gradients()
    with optimize(decoder):
        found = gradients()
    assert_same_gradients(found, wanted, GRADIENT_TOLERANCE)


@pytest.mark.parametrize(("prompts", "threshold"), [(1, 0.0), (3, -0.3), (2, 1.5)])
@torch.no_grad()
def test_a_predictor_makes_masks_without_large_logits(prompts: int, threshold: float) -> None:
    """Its logits, which the next call takes, stay those of the decoder; it keeps its own threshold."""
    predictor = sam2.SAM2ImagePredictor(threshold)
    points = torch.rand(prompts, 2, 2) * 4 * sam2.GRID
    prompt = points, torch.ones(prompts, 2, dtype=torch.int)
    masks, *wanted = predictor._predict(*prompt)
    logits = predictor._predict(*prompt, return_logits=True)[0]
    found: list[Any] = []
    with optimize(predictor):
        calls = calls_of(lambda: found.extend(predictor._predict(*prompt, img_idx=0)))
        assert calls["mask_postprocess"] == calls["mask_upscale"] == 1
        assert_close(predictor._predict(*prompt, return_logits=True)[0], logits, 1e-4)
    assert_masks_equal(found[0], masks, logits - threshold)
    for ours, theirs in zip(found[1:], wanted, strict=True):
        assert_close(ours, theirs, 1e-4)
    assert predictor.mask_threshold == threshold


@torch.no_grad()
def test_holes_are_filled_by_the_predictors_own_code() -> None:
    predictor = sam2.SAM2ImagePredictor()
    box = torch.tensor([[2.0, 3.0, 15.0, 20.0]])
    plain = predictor._predict(None, None, box)[0]
    predictor._transforms.max_hole_area = 8.0
    wanted = predictor._predict(None, None, box)[0]
    assert not torch.equal(plain, wanted)
    logits = predictor._predict(None, None, box, return_logits=True)[0]
    with optimize(predictor):
        found = predictor._predict(None, None, box)[0]
    assert_masks_equal(found, wanted, logits)


@pytest.mark.parametrize(
    ("make", "replaced"),
    [(sam2.base, 4), (sam2.SAM2ImagePredictor, 5), (sam2.generator, 5)],
    ids=["SAM2Base", "SAM2ImagePredictor", "SAM2AutomaticMaskGenerator"],
)
def test_each_class_is_served(make: Any, replaced: int) -> None:
    """The decoder's method, its transformer's and its two blocks', and the predictor's."""
    model = make()
    with optimize(model) as handle:
        assert repr(handle) == f"Optimization({replaced} methods replaced)"
        with pytest.raises(ValueError, match="got one that was replaced before"):
            optimize(model)
    optimize(copy.deepcopy(model)).undo()


def with_gate(decoder: Any) -> None:
    decoder.gate = nn.Linear(2, 2)


def with_tanh(decoder: Any) -> None:
    decoder.output_upscaling[2] = nn.GELU(approximate="tanh")


def of_other_method(decoder: Any) -> None:
    kind = type(decoder)
    forward = {"predict_masks": lambda self, image_embeddings, prompts: None}
    decoder.__class__ = type("MaskDecoder", (kind,), forward)


def on_meta(decoder: Any) -> None:
    decoder.to("meta")


def that_squares(decoder: Any) -> None:
    kind = type(decoder)

    def predict_masks(
        self: Any,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        repeat_image: bool,
        high_res_features: Any = None,
    ) -> Any:
        inputs = (
            sparse_prompt_embeddings,
            dense_prompt_embeddings,
            repeat_image,
            high_res_features,
        )
        masks, *others = kind.predict_masks(self, image_embeddings, image_pe, *inputs)
        return masks**2, *others

    decoder.__class__ = type("MaskDecoder", (kind,), {"predict_masks": predict_masks})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_gate, r"model.sam_mask_decoder: got members .*'gate'"),
        (with_tanh, "its activation: got GELU.approximate='tanh'., wanted the exact"),
        (
            of_other_method,
            "predict_masks: got parameters image_embeddings, prompts, wanted .*: this",
        ),
        (on_meta, "got weights on the meta device"),
        (that_squares, "model.sam_mask_decoder: computes something else than SAM's mask decoder"),
    ],
)
def test_another_decoder_is_refused_in_words(change: Any, words: str) -> None:
    model = sam2.base()
    change(model.sam_mask_decoder)
    with pytest.raises(ValueError, match=words):
        optimize(model)


@torch.no_grad()
def test_attention_with_dropout_stays_as_it_is() -> None:
    decoder, inputs = sam2.mask_decoder(), sam2.decoder_inputs(1, 1, False)
    decoder.transformer.final_attn_token_to_image.dropout_p = 0.1
    with optimize(decoder) as handle:
        assert repr(handle) == "Optimization(1 methods replaced)"
        assert calls_of(lambda: decoder(True, **inputs)) == {"mask_upscale": 1}
