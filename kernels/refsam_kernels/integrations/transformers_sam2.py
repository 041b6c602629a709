"""transformers' mask decoders and processors of SAM 2, SAM 3's tracker and EdgeTAM: from features to masks.

One class was copied under six names (`DECODERS`). It adds features of higher resolution behind each of the upscaling's
convolutions, and gives tokens and scores of objects beside the masks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from refsam_kernels.integrations import transformers_masks, transformers_two_way
from refsam_kernels.integrations.mask_decoder import to_masks, upscale
from refsam_kernels.integrations.replacement import Replacement, refuse

DECODERS = {
    "Sam2MaskDecoder", "Sam2VideoMaskDecoder", "Sam3TrackerMaskDecoder", "Sam3TrackerVideoMaskDecoder", "EdgeTamMaskDecoder",
    "EdgeTamVideoMaskDecoder",
}  # fmt: skip
PROCESSORS = {
    "Sam2Processor", "Sam2VideoProcessor", "Sam3TrackerProcessor", "Sam3TrackerVideoProcessor", "Sam2ImageProcessor",
    "Sam3ImageProcessor",
}  # fmt: skip
MEMBERS = transformers_masks.MEMBERS | {
    "conv_s0",
    "conv_s1",
    "obj_score_token",
    "pred_obj_score_head",
}
TAKES = (
    "image_embeddings", "image_positional_embeddings", "sparse_prompt_embeddings", "dense_prompt_embeddings",
    "multimask_output", "high_resolution_features", "attention_similarity", "target_embedding", "kwargs",
)  # fmt: skip
SIZES = (
    "masks", "original_sizes", "mask_threshold", "binarize", "max_hole_area", "max_sprinkle_area",
    "apply_non_overlapping_constraints", "kwargs",
)  # fmt: skip


def of_decoder(decoder: Any, path: str) -> list[Replacement]:
    """The replacements for one of these mask decoders. Raises `ValueError` if it is modified inside."""
    refuse(list(transformers_masks.decoder_reasons(path, decoder, DECODERS, MEMBERS)))
    two_way = transformers_two_way.replacements(f"{path}.transformer", decoder.transformer)
    return [Replacement(path, decoder, _decoder, parameters=TAKES), *two_way]


def example(decoder: Any, normal: Callable[..., Tensor]) -> Tensor:
    """Logits of two prompts, by a generator of random tensors of a shape."""
    width = decoder.mask_tokens.weight.shape[1]
    features = [normal(1, width // 8, 16, 20), normal(1, width // 4, 8, 10)]
    return transformers_masks.example(decoder, normal, high_resolution_features=features)


def of_processor(processor: Any, path: str) -> list[Replacement]:
    """The replacements for one of these processors or in its image processor: the way from logits to masks."""
    image_processor = getattr(processor, "image_processor", processor)
    return [Replacement(path, image_processor, _post_process_masks, "post_process_masks", SIZES)]


def _decoder(
    decoder: Any,
    image_embeddings: Tensor,
    image_positional_embeddings: Tensor,
    sparse_prompt_embeddings: Tensor,
    dense_prompt_embeddings: Tensor,
    multimask_output: bool,
    high_resolution_features: Sequence[Tensor],
    attention_similarity: Tensor | None = None,
    target_embedding: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Sam2MaskDecoder.forward`: masks (B, P, M, 4h, 4w), their IoUs and tokens, and scores of objects (B, P, 1).

    For inference only the masks that are wanted are computed; all where the class itself chooses among them, and for training.
    """
    parts = (decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens)
    own = torch.cat([part.weight for part in parts])
    batch, count = len(image_embeddings), sparse_prompt_embeddings.shape[1]
    tokens = own.expand(batch, count, -1, -1)
    if len(sparse_prompt_embeddings):
        tokens = torch.cat([tokens, sparse_prompt_embeddings], dim=2)
    image = (image_embeddings + dense_prompt_embeddings).repeat_interleave(count, 0)
    tokens, pixels = decoder.transformer(
        point_embeddings=tokens.to(own.dtype),
        image_embeddings=image,
        image_positional_embeddings=image_positional_embeddings.repeat_interleave(count, 0),
        attention_similarity=attention_similarity,
        target_embedding=target_embedding,
        **kwargs,
    )
    wanted = range(1, decoder.num_mask_tokens) if multimask_output else range(1)
    chooses = decoder.dynamic_multimask_via_stability and not (decoder.training or multimask_output)
    every = range(decoder.num_mask_tokens)
    computed = every if chooses or torch.is_grad_enabled() else wanted
    of_masks = tokens[:, :, 2 : 2 + decoder.num_mask_tokens]
    hyper = [decoder.output_hypernetworks_mlps[i](of_masks[:, :, i]) for i in computed]
    feat_s0, feat_s1 = (_for_prompts(x, batch, count) for x in high_resolution_features)
    masks = upscale(
        pixels.flatten(0, 1).unflatten(1, image.shape[2:]),
        torch.stack(hyper, dim=2).flatten(0, 1),
        decoder.upscale_conv1,
        decoder.upscale_layer_norm,
        decoder.upscale_conv2,
        feat_s1=feat_s1,
        feat_s0=feat_s0,
    ).unflatten(0, (batch, count))
    iou, score = (
        decoder.iou_prediction_head(tokens[:, :, 1]),
        decoder.pred_obj_score_head(tokens[:, :, 0]),
    )
    of_masks = of_masks[:, :, wanted.start : wanted.stop]
    if chooses:
        return *decoder._dynamic_multimask_via_stability(masks, iou), of_masks, score
    masks = masks[:, :, wanted.start - computed.start :][:, :, : len(wanted)]
    return masks, iou[:, :, wanted.start : wanted.stop], of_masks, score


def _for_prompts(feature: Tensor, batch: int, count: int) -> Tensor:
    """A feature of each image (B, C, H, W) for each prompt; one image's is shared by all."""
    return feature if batch == 1 else feature.repeat_interleave(count, 0)


def _post_process_masks(
    processor: Any,
    masks: Sequence[Any],
    original_sizes: Any,
    mask_threshold: float = 0.0,
    binarize: bool = True,
    max_hole_area: float = 0.0,
    max_sprinkle_area: float = 0.0,
    apply_non_overlapping_constraints: bool = False,
    **kwargs: Any,
) -> list[Tensor]:
    """`post_process_masks`; where logits are wanted, masks compete, or logits are not square, the class's own."""
    if (
        not binarize
        or apply_non_overlapping_constraints
        or any(x.shape[-2] != x.shape[-1] for x in masks)
    ):
        arguments = (
            masks, original_sizes, mask_threshold, binarize, max_hole_area, max_sprinkle_area, apply_non_overlapping_constraints
        )  # fmt: skip
        return type(processor).post_process_masks(processor, *arguments, **kwargs)
    return [
        to_masks(torch.as_tensor(logits), (int(height), int(width)), mask_threshold)
        for logits, (height, width) in zip(masks, original_sizes, strict=False)
    ]
