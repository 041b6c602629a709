"""transformers' `SamModel`, `SamMaskDecoder` and the processors of SAM: from features to masks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from refsam_kernels.integrations import transformers_two_way
from refsam_kernels.integrations.mask_decoder import to_masks, upscale, upscaling_reasons
from refsam_kernels.integrations.replacement import Replacement, refuse, structure_reasons

MEMBERS = {
    "transformer", "iou_token", "mask_tokens", "upscale_conv1", "upscale_conv2", "upscale_layer_norm", "activation",
    "output_hypernetworks_mlps", "iou_prediction_head",
}  # fmt: skip
EMBEDDINGS = (
    "image_embeddings", "image_positional_embeddings", "sparse_prompt_embeddings", "dense_prompt_embeddings",
    "multimask_output", "attention_similarity", "target_embedding",
)  # fmt: skip
SIZES = (
    "masks", "original_sizes", "reshaped_input_sizes", "mask_threshold", "binarize", "pad_size"
)  # fmt: skip


def of_decoder(decoder: Any, path: str) -> list[Replacement]:
    """The replacements for a `SamMaskDecoder`. Raises `ValueError` if it is modified inside."""
    refuse(list(decoder_reasons(path, decoder, {"SamMaskDecoder"}, MEMBERS)))
    two_way = transformers_two_way.replacements(f"{path}.transformer", decoder.transformer)
    return [Replacement(path, decoder, _decoder, parameters=EMBEDDINGS), *two_way]


def example(decoder: Any, normal: Callable[..., Tensor], **more: Any) -> Tensor:
    """Logits of two prompts, by a generator of random tensors of a shape; `more` is given to the decoder, too."""
    width = decoder.mask_tokens.weight.shape[1]
    image, positions, dense = (normal(1, width, 4, 5) for _ in range(3))
    tokens = normal(1, 2, 3, width)
    return decoder(image, positions, tokens, dense, multimask_output=True, **more)[0]


def of_processor(processor: Any, path: str) -> list[Replacement]:
    """The replacements for a `SamProcessor` or in one of its image processors: the way from logits to masks."""
    image_processor = getattr(processor, "image_processor", processor)
    method = "post_process_masks"
    return [Replacement(path, image_processor, _post_process_masks, method, SIZES)]


def decoder_reasons(path: str, decoder: Any, classes: set[str], members: set[str]) -> Iterator[str]:
    """Why a decoder of one of these classes, with these members, cannot be replaced."""
    reasons = list(structure_reasons(path, decoder, classes, members))
    yield from reasons or upscaling_reasons(
        path,
        decoder.upscale_conv1,
        decoder.upscale_layer_norm,
        (decoder.activation,),
        decoder.upscale_conv2,
    )


def _decoder(
    decoder: Any,
    image_embeddings: Tensor,
    image_positional_embeddings: Tensor,
    sparse_prompt_embeddings: Tensor | None,
    dense_prompt_embeddings: Tensor,
    multimask_output: bool,
    attention_similarity: Tensor | None = None,
    target_embedding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`SamMaskDecoder.forward`; for inference only the masks that are wanted are computed.

    For training all, as there: DistributedDataParallel waits for a gradient of every parameter, zeros included.
    """
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    batch, count, tokens = len(image_embeddings), 1, own.expand(len(image_embeddings), 1, -1, -1)
    if sparse_prompt_embeddings is not None:
        count = sparse_prompt_embeddings.shape[1]
        tokens = torch.cat([tokens.expand(-1, count, -1, -1), sparse_prompt_embeddings], dim=2)
    image = (image_embeddings + dense_prompt_embeddings).repeat_interleave(count, 0)
    tokens, pixels = decoder.transformer(
        point_embeddings=tokens.to(own.dtype),
        image_embeddings=image,
        image_positional_embeddings=image_positional_embeddings.repeat_interleave(count, 0),
        attention_similarity=attention_similarity,
        target_embedding=target_embedding,
    )
    wanted = range(1, decoder.num_mask_tokens) if multimask_output else range(1)
    computed = range(decoder.num_mask_tokens) if torch.is_grad_enabled() else wanted
    each = [decoder.output_hypernetworks_mlps[i](tokens[:, :, 1 + i]) for i in computed]
    hyper = torch.stack(each, dim=2)[:, :, wanted.start - computed.start :][:, :, : len(wanted)]
    masks = upscale(
        pixels.flatten(0, 1).unflatten(1, image.shape[2:]),
        hyper.flatten(0, 1),
        decoder.upscale_conv1,
        decoder.upscale_layer_norm,
        decoder.upscale_conv2,
    )
    iou = decoder.iou_prediction_head(tokens[:, :, 0])[:, :, wanted.start : wanted.stop]
    return masks.unflatten(0, (batch, count)), iou


def _post_process_masks(
    processor: Any,
    masks: Sequence[Any],
    original_sizes: Any,
    reshaped_input_sizes: Any,
    mask_threshold: float = 0.0,
    binarize: bool = True,
    pad_size: dict[str, int] | None = None,
) -> list[Tensor]:
    """`post_process_masks`; where logits are wanted, or the model's image is no square, the class's own."""
    pad = processor.pad_size if pad_size is None else pad_size
    if not binarize or pad["height"] != pad["width"]:
        arguments = (
            masks,
            original_sizes,
            reshaped_input_sizes,
            mask_threshold,
            binarize,
            pad_size,
        )
        return type(processor).post_process_masks(processor, *arguments)
    sizes = zip(masks, _pairs(reshaped_input_sizes), _pairs(original_sizes), strict=True)
    return [
        to_masks(
            torch.as_tensor(logits),
            output_size,
            mask_threshold,
            image_size=pad["height"],
            input_size=input_size,
        )
        for logits, input_size, output_size in sizes
    ]


def _pairs(sizes: Any) -> list[tuple[int, int]]:
    """Sizes as integers, from a list, a tensor or an array (B, 2)."""
    return [(int(height), int(width)) for height, width in sizes]
