"""Makes other libraries' SAM faster in place: segment-anything's, transformers' and timm's.

Classes are recognised by their names and checked by their parts; none of these libraries is imported.
"""

from collections.abc import Callable
from typing import Any

from refsam_kernels.core.checks import require
from refsam_kernels.integrations import (
    segment_anything,
    segment_anything_generator,
    segment_anything_masks,
    timm,
    transformers,
    transformers_masks,
)
from refsam_kernels.integrations.replacement import Optimization, Replacement

__all__ = ["Optimization", "optimize"]

MODELS: dict[str, Callable[[Any], list[Replacement]]] = {
    "Sam": segment_anything_masks.of_sam,
    "ImageEncoderViT": segment_anything.replacements,
    "MaskDecoder": segment_anything_masks.of_decoder,
    "SamPredictor": segment_anything_masks.of_predictor,
    "SamAutomaticMaskGenerator": segment_anything_generator.of_generator,
    "SamModel": transformers_masks.of_model,
    "SamVisionModel": transformers.replacements,
    "SamVisionEncoder": transformers.replacements,
    "SamMaskDecoder": transformers_masks.of_decoder,
    "SamProcessor": transformers_masks.of_processor,
    "SamImageProcessor": transformers_masks.of_processor,
    "SamImageProcessorPil": transformers_masks.of_processor,
    "VisionTransformerSAM": timm.replacements,
}

_NEWER = "SAM 2 and later have another image encoder: nothing here can stand for its parts"
_ADVICE = {
    "TinyViT": "MobileSAM has SAM's mask decoder: give model.mask_decoder to optimize() instead",
    "MaskDecoderHQ": "SAM-HQ has SAM's image encoder: give model.image_encoder to optimize() instead",
    "SamHQModel": "SAM-HQ is served only in its own library: give its image_encoder to optimize()",
    "SAM2Base": _NEWER,
    "SAM2ImagePredictor": _NEWER,
    "Sam2Model": _NEWER,
    "Sam2VideoModel": _NEWER,
    "Sam2VisionModel": _NEWER,
    "Sam3Model": _NEWER,
}


def optimize(model: Any) -> Optimization:
    """Make a SAM use this library's operators, in place, for training and inference.

    The image encoder's attention never materialises its probabilities or bias, and its windows are
    neither copied nor padded; the mask decoder's upscaling is one operator, and masks are made without
    logits of the frame's size. Parameters, buffers and the state dict stay the same. Sub-modules are
    called as before, so hooks, wrappers and later changes of weights still work; only the upscaling's
    modules are read, not called. The modules of a windowed attention get the whole grid, not windows.
    Gradients are those of the original, including the zeros that DistributedDataParallel waits for.

    For inference on a CPU, linear layers are packed, and packed again after their weights change.
    Changes that torch's version counter records are always seen. Changes that it misses
    (`p.data.mul_()`, `torch._foreach_*`, a mean teacher's loop, FSDP's flat parameters) are seen if a
    whole row or column changes; write smaller ones in place under `torch.no_grad()`.

    Outputs differ by the order of sums: in float32 features by at most 1e-5 of their largest value,
    logits of masks by 1e-4, and masks only where a logit is within 1e-5 of the threshold, relative to
    the largest logit; in bfloat16, features have at most twice the original's error.

    Args:
        model: segment-anything's `Sam`, `SamPredictor`, `SamAutomaticMaskGenerator` (which then refuses
            logits that are not finite), `ImageEncoderViT` or `MaskDecoder`; transformers'
            `SamModel`, `SamVisionModel`, `SamVisionEncoder` or `SamMaskDecoder` (attention eager or SDPA),
            and `SamProcessor` or `SamImageProcessor`, whose `post_process_masks` refuses logits that are not
            finite; timm's `VisionTransformerSAM`; or a sub-class. Any dtype, device and size.

    Returns:
        The handle whose `undo()` restores the model. Until then transformers' `output_attentions`
        returns none.

    Raises:
        ValueError: the model is of another kind, was optimized already, differs inside from the class
            that it is named after (adapters, dropout in attention, no relative positions), or comes from
            a version of its library whose methods take other arguments; it is unchanged then.
    """
    names = [parent.__name__ for parent in type(model).__mro__]
    known = [name for name in names if name in MODELS]
    require(bool(known), "model", f"a {names[0]}", f"one of {', '.join(MODELS)}{_advice(names)}")
    try:
        return Optimization(MODELS[known[0]](model))
    except ValueError as error:
        parts = (getattr(model, part, None) for part in ("image_encoder", "mask_decoder"))
        raise ValueError(f"{error}{_advice([type(part).__name__ for part in parts])}") from None


def _advice(class_names: list[str]) -> str:
    """Advice for models of these classes, appended to the error that refuses them."""
    return "".join(f" ({_ADVICE[name]})" for name in class_names if name in _ADVICE)
