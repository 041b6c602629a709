"""segment-anything's `Sam`, `MaskDecoder` and `SamPredictor`: from the image encoder's features to masks."""

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from refsam_kernels.integrations import two_way_transformer
from refsam_kernels.integrations.encoders import find_blocks
from refsam_kernels.integrations.mask_decoder import to_masks, upscale, upscaling_reasons
from refsam_kernels.integrations.replacement import Replacement, refuse, structure_reasons

MEMBERS = {
    "transformer", "iou_token", "mask_tokens", "output_upscaling", "output_hypernetworks_mlps", "iou_prediction_head"
}  # fmt: skip
EMBEDDINGS = (
    "image_embeddings", "image_pe", "sparse_prompt_embeddings", "dense_prompt_embeddings"
)  # fmt: skip
SAM_TAKES = ("batched_input", "multimask_output")
PROMPTS = (
    "point_coords", "point_labels", "boxes", "mask_input", "multimask_output", "return_logits"
)  # fmt: skip


def of_sam(sam: Any, path: str) -> list[Replacement]:
    """The way of a `Sam` from logits to masks; none for one that goes another way, as SAM-HQ's does."""
    if not (
        find_blocks(sam.image_encoder) or type(sam.image_encoder).__name__ == "ImageEncoderViT"
    ):
        kind = type(sam.image_encoder).__name__
        refuse([f"{path}.image_encoder: got a {kind}, wanted ImageEncoderViT"])
    goes_this_way = (
        type(sam.mask_decoder).__name__ == "MaskDecoder"
        and tuple(signature(type(sam).forward).parameters)[1:] == SAM_TAKES
        and inherits(sam, "forward", "Sam")
        and inherits(sam, "postprocess_masks", "Sam")
    )
    return [Replacement(path, sam, _sam, parameters=SAM_TAKES)] if goes_this_way else []


def of_predictor(predictor: Any, path: str) -> list[Replacement]:
    """The replacement for a `SamPredictor` itself, without its `Sam`; a sub-class's own way to masks stays."""
    if not makes_masks(predictor):
        return []
    return [Replacement(path, predictor, _predict_torch, "predict_torch", PROMPTS)]


def makes_masks(predictor: Any) -> bool:
    """Whether a `SamPredictor` makes masks as its class does: with its own methods and those of `Sam`."""
    has_own_masks = inherits(predictor.model, "postprocess_masks", "Sam")
    return has_own_masks and inherits(predictor, "predict_torch", "SamPredictor")


def of_decoder(decoder: Any, path: str) -> list[Replacement]:
    """The replacements for a `MaskDecoder` and its transformer. Raises `ValueError` if it is modified inside."""
    refuse(list(_decoder_reasons(path, decoder)))
    found = two_way_transformer.replacements(f"{path}.transformer", decoder.transformer)
    return [Replacement(path, decoder, _predict_masks, "predict_masks", EMBEDDINGS), *found]


def example(decoder: Any, normal: Callable[..., Tensor]) -> Tensor:
    """Logits of two prompts, by a generator of random tensors of a shape."""
    width = decoder.mask_tokens.weight.shape[1]
    image, positions = normal(1, width, 4, 5), normal(1, width, 4, 5)
    return decoder.predict_masks(image, positions, normal(2, 3, width), normal(2, width, 4, 5))[0]


def inherits(instance: object, method: str, class_name: str) -> bool:
    """Whether the method is that of the class of this name, and no sub-class's own."""
    definer = next(kind for kind in type(instance).__mro__ if method in vars(kind))
    return definer.__name__ == class_name


def _decoder_reasons(path: str, decoder: Any) -> Iterator[str]:
    reasons = list(structure_reasons(path, decoder, {"MaskDecoder"}, MEMBERS))
    yield from reasons or upscaling_reasons_of(path, decoder)


def upscaling_reasons_of(path: str, decoder: Any) -> Iterator[str]:
    """Why `upscale` cannot stand for a decoder's `output_upscaling`."""
    path, parts = f"{path}.output_upscaling", list(decoder.output_upscaling)
    kinds = [type(part).__name__ for part in parts]
    wanted = ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d", "GELU"]
    if kinds != wanted:
        yield f"{path}: got {', '.join(kinds)}, wanted {', '.join(wanted)}"
        return
    conv1, norm, first, conv2, second = parts
    yield from upscaling_reasons(path, conv1, norm, (first, second), conv2)


def _predict_masks(
    decoder: Any,
    image_embeddings: Tensor,
    image_pe: Tensor,
    sparse_prompt_embeddings: Tensor,
    dense_prompt_embeddings: Tensor,
) -> tuple[Tensor, Tensor]:
    """`MaskDecoder.predict_masks`; the transformer's tokens go into the upscaling as they lie."""
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    count = len(sparse_prompt_embeddings)
    tokens = torch.cat([own.expand(count, -1, -1), sparse_prompt_embeddings], dim=1)
    image = for_each(image_embeddings, count) + dense_prompt_embeddings
    tokens, pixels = decoder.transformer(image, for_each(image_pe, count), tokens)
    mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
    hyper = [mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    conv1, norm, _, conv2, _ = decoder.output_upscaling
    features = pixels.unflatten(1, image.shape[2:])
    masks = upscale(features, torch.stack(hyper, dim=1), conv1, norm, conv2)
    return masks, decoder.iou_prediction_head(tokens[:, 0])


def for_each(of_image: Tensor, count: int) -> Tensor:
    """Expand a tensor of one image (1, C, h, w) to its prompts, without copies."""
    if len(of_image) == 1:
        return of_image.expand(count, -1, -1, -1)
    return of_image.repeat_interleave(count, dim=0)


@torch.no_grad()
def _sam(
    sam: Any, batched_input: Sequence[dict[str, Any]], multimask_output: bool
) -> list[dict[str, Tensor]]:
    """`Sam.forward`, whose masks never exist as logits of the frame's size."""
    images = torch.stack([sam.preprocess(record["image"]) for record in batched_input])
    outputs = []
    for record, features in zip(batched_input, sam.image_encoder(images), strict=True):
        has_points = "point_coords" in record
        points = (record["point_coords"], record["point_labels"]) if has_points else None
        logits, iou = decode(
            sam, features[None], points, record.get("boxes"), record.get("mask_inputs"), multimask_output
        )  # fmt: skip
        masks = _masks(sam, logits, record["image"].shape[-2:], record["original_size"])
        outputs.append({"masks": masks, "iou_predictions": iou, "low_res_logits": logits})
    return outputs


@torch.no_grad()
def _predict_torch(
    predictor: Any,
    point_coords: Tensor | None,
    point_labels: Tensor | None,
    boxes: Tensor | None = None,
    mask_input: Tensor | None = None,
    multimask_output: bool = True,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`SamPredictor.predict_torch`; only asked for does it make logits of the frame's size."""
    if return_logits or not predictor.is_image_set:
        prompts = (point_coords, point_labels, boxes, mask_input, multimask_output, return_logits)
        return type(predictor).predict_torch(predictor, *prompts)
    points = None if point_coords is None else (point_coords, point_labels)
    sam = predictor.model
    logits, iou = decode(sam, predictor.features, points, boxes, mask_input, multimask_output)
    return _masks(sam, logits, predictor.input_size, predictor.original_size), iou, logits


def decode(
    sam: Any, features: Tensor, points: Any, boxes: Any, masks: Any, multimask_output: bool
) -> tuple[Tensor, Tensor]:
    """Logits (P, M, 4h, 4w) and predicted IoUs (P, M) of one image's prompts."""
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
    return sam.mask_decoder(
        image_embeddings=features,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )


def _masks(
    sam: Any, logits: Tensor, input_size: Sequence[int], original_size: Sequence[int]
) -> Tensor:
    """`postprocess_masks` and the threshold: logits (P, M, 4h, 4w) to masks (P, M, H, W) bool."""
    image_size = sam.image_encoder.img_size
    return to_masks(
        logits, original_size, sam.mask_threshold, image_size=image_size, input_size=input_size
    )
