"""The `sam2` library's `MaskDecoder` and `SAM2ImagePredictor`, and their copies: from features to masks.

Follows facebookresearch/sam2 `modeling/sam/mask_decoder.py` and `sam2_image_predictor.py`.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from refsam_kernels.integrations import segment_anything_masks, two_way_transformer
from refsam_kernels.integrations.mask_decoder import to_masks, upscale
from refsam_kernels.integrations.replacement import Replacement, refuse, structure_reasons
from refsam_kernels.integrations.segment_anything_masks import for_each, inherits

# Members that a decoder has in addition to segment-anything's, by the attribute that says so.
MORE = {
    "use_high_res_features": {"conv_s0", "conv_s1"},
    "pred_obj_scores": {"obj_score_token", "pred_obj_score_head"},
}
EMBEDDINGS = (*segment_anything_masks.EMBEDDINGS, "repeat_image", "high_res_features")
PROMPTS = (
    "point_coords", "point_labels", "boxes", "mask_input", "multimask_output", "return_logits", "img_idx"
)  # fmt: skip
# The score of an object where the decoder predicts none: it is there.
PRESENT = 10.0


def is_its_decoder(decoder: Any) -> bool:
    """Whether a `MaskDecoder` is this library's, not segment-anything's."""
    return hasattr(decoder, "use_high_res_features")


def of_decoder(decoder: Any, path: str) -> list[Replacement]:
    """The replacements for a `MaskDecoder` and its transformer. Raises `ValueError` if it is modified inside."""
    refuse(list(_decoder_reasons(path, decoder)))
    found = two_way_transformer.replacements(f"{path}.transformer", decoder.transformer)
    return [Replacement(path, decoder, _predict_masks, "predict_masks", EMBEDDINGS), *found]


def _decoder_reasons(path: str, decoder: Any) -> Iterator[str]:
    members = set(segment_anything_masks.MEMBERS)
    for sign, more in MORE.items():
        members |= more if getattr(decoder, sign, False) else set()
    reasons = list(structure_reasons(path, decoder, {"MaskDecoder"}, members))
    yield from reasons or segment_anything_masks.upscaling_reasons_of(path, decoder)


def example(decoder: Any, normal: Callable[..., Tensor]) -> Tensor:
    """Logits of two prompts, by a generator of random tensors of a shape."""
    width = decoder.mask_tokens.weight.shape[1]
    image, positions, dense = normal(1, width, 4, 5), normal(1, width, 4, 5), normal(2, width, 4, 5)
    features = [normal(1, width // 8, 16, 20), normal(1, width // 4, 8, 10)]
    tokens, used = normal(2, 3, width), features if decoder.use_high_res_features else None
    logits: Tensor = decoder.predict_masks(image, positions, tokens, dense, True, used)[0]
    return logits


def _predict_masks(
    decoder: Any,
    image_embeddings: Tensor,
    image_pe: Tensor,
    sparse_prompt_embeddings: Tensor,
    dense_prompt_embeddings: Tensor,
    repeat_image: bool,
    high_res_features: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`MaskDecoder.predict_masks`: masks (P, M, 4h, 4w), their IoUs, their tokens, and scores of objects (P, 1)."""
    scores = int(decoder.pred_obj_scores)
    parts = [decoder.obj_score_token] if scores else []
    parts += [decoder.iou_token, decoder.mask_tokens]
    own = torch.cat([part.weight for part in parts])
    count = len(sparse_prompt_embeddings)
    tokens = torch.cat([own.expand(count, -1, -1), sparse_prompt_embeddings], dim=1)
    image = for_each(image_embeddings, count) if repeat_image else image_embeddings
    image = image + dense_prompt_embeddings
    tokens, pixels = decoder.transformer(image, for_each(image_pe, count), tokens)
    of_masks = tokens[:, scores + 1 :][:, : decoder.num_mask_tokens]
    hyper = [mlp(of_masks[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    conv1, norm, _, conv2, _ = decoder.output_upscaling
    features, feats = pixels.unflatten(1, image.shape[2:]), {}
    if decoder.use_high_res_features and high_res_features is not None:
        feats = dict(zip(("feat_s0", "feat_s1"), high_res_features, strict=True))
    masks = upscale(features, torch.stack(hyper, dim=1), conv1, norm, conv2, **feats)
    iou = decoder.iou_prediction_head(tokens[:, scores])
    score = (
        decoder.pred_obj_score_head(tokens[:, 0]) if scores else PRESENT * iou.new_ones(count, 1)
    )
    return masks, iou, of_masks, score


def of_predictor(predictor: Any, path: str) -> list[Replacement]:
    """The replacement for a `SAM2ImagePredictor` itself, without its model; a sub-class's own way to masks stays."""
    if not inherits(predictor, "_predict", "SAM2ImagePredictor"):
        return []
    return [Replacement(path, predictor, _predict, "_predict", PROMPTS)]


def of_generator(generator: Any, path: str) -> list[Replacement]:
    """The replacement for the predictor of a `SAM2AutomaticMaskGenerator`."""
    return of_predictor(generator.predictor, f"{path}.predictor")


def _predict(
    predictor: Any,
    point_coords: Tensor | None,
    point_labels: Tensor | None,
    boxes: Tensor | None = None,
    mask_input: Tensor | None = None,
    multimask_output: bool = True,
    return_logits: bool = False,
    img_idx: int = -1,
) -> Any:
    """`SAM2ImagePredictor._predict`; only asked for, or where holes are filled, does it make logits of the frame's size."""
    transforms, kind = predictor._transforms, type(predictor)
    if not (return_logits or transforms.max_hole_area > 0 or transforms.max_sprinkle_area > 0):
        masks = _Masks(transforms, predictor.mask_threshold)
        predictor = copy.copy(predictor)
        # The class's method compares what it gets with a threshold: masks, here.
        predictor._transforms, predictor.mask_threshold = masks, 0.5
    prompts = (point_coords, point_labels, boxes, mask_input, multimask_output, return_logits)
    return kind._predict(predictor, *prompts, img_idx)


class _Masks:
    """`SAM2Transforms` whose `postprocess_masks` gives masks."""

    def __init__(self, transforms: Any, threshold: float) -> None:
        self._transforms, self._threshold = transforms, threshold

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transforms, name)

    def postprocess_masks(self, logits: Tensor, orig_hw: Sequence[int]) -> Tensor:
        """Logits (P, M, h, w) to masks (P, M, H, W) bool."""
        height, width = logits.shape[-2:]
        if height != width:
            resized: Tensor = self._transforms.postprocess_masks(logits, orig_hw)
            return resized > self._threshold
        return to_masks(logits.float(), [int(side) for side in orig_hw], self._threshold)
