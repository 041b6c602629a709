"""Makes other libraries' SAM faster in place: segment-anything's, transformers', timm's, and what is made of them.

Image encoders are recognised by their structure, other parts by their names and checked by their members; none of these
libraries is imported.
"""

from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from refsam_kernels.core.checks import require
from refsam_kernels.int8_linear.op import say_if_slow
from refsam_kernels.integrations import (
    sam2_library,
    segment_anything_generator,
    segment_anything_masks,
    transformers_masks,
    transformers_sam2,
)
from refsam_kernels.integrations.encoders import Block, find_blocks, norm_replacements
from refsam_kernels.integrations.modules import Int8Attend
from refsam_kernels.integrations.probe import block_reasons, decoder_reasons
from refsam_kernels.integrations.replacement import (
    Optimization,
    Replacement,
    loading_reasons,
    refuse,
)

__all__ = ["Optimization", "optimize"]


def _library_of(decoder: Any) -> Any:
    """The module for a `MaskDecoder`; two libraries have one of this name."""
    return sam2_library if sam2_library.is_its_decoder(decoder) else segment_anything_masks


def _of_mask_decoder(decoder: Any, path: str) -> list[Replacement]:
    found: list[Replacement] = _library_of(decoder).of_decoder(decoder, path)
    return found


def _mask_decoder_example(decoder: Any, normal: Callable[..., Tensor]) -> Tensor:
    logits: Tensor = _library_of(decoder).example(decoder, normal)
    return logits


# Replaced in modules of these names, beside the blocks of image encoders.
PARTS: dict[str, Callable[[Any, str], list[Replacement]]] = {
    "Sam": segment_anything_masks.of_sam,
    "MaskDecoder": _of_mask_decoder,
    "SamMaskDecoder": transformers_masks.of_decoder,
    **dict.fromkeys(sorted(transformers_sam2.DECODERS), transformers_sam2.of_decoder),
}
# How to call the decoders among them on random numbers, for the check.
EXAMPLES: dict[str, Callable[..., Tensor]] = {
    "MaskDecoder": _mask_decoder_example,
    "SamMaskDecoder": transformers_masks.example,
    **dict.fromkeys(sorted(transformers_sam2.DECODERS), transformers_sam2.example),
}
# The same for holders, which are no modules, and where the module stands that they hold.
HOLDERS: dict[str, Callable[[Any, str], list[Replacement]]] = {
    "SamPredictor": segment_anything_masks.of_predictor,
    "SamAutomaticMaskGenerator": segment_anything_generator.of_generator,
    "SAM2ImagePredictor": sam2_library.of_predictor,
    "SAM2AutomaticMaskGenerator": sam2_library.of_generator,
    "SamProcessor": transformers_masks.of_processor,
    "SamHQProcessor": transformers_masks.of_processor,
    "SamImageProcessor": transformers_masks.of_processor,
    "SamImageProcessorPil": transformers_masks.of_processor,
    **dict.fromkeys(sorted(transformers_sam2.PROCESSORS), transformers_sam2.of_processor),
}
HELD = {
    **dict.fromkeys(("SamPredictor", "SAM2ImagePredictor"), "model"),
    **dict.fromkeys(("SamAutomaticMaskGenerator", "SAM2AutomaticMaskGenerator"), "predictor.model"),
}

_WANTED = (
    "one of Sam, ImageEncoderViT, SamPredictor, SamModel, or another model with SAM's blocks "
    "(python -m refsam_kernels.integrations --list)"
)
_ADVICE = {
    "TinyViT": "MobileSAM has SAM's mask decoder: give model.mask_decoder to optimize() instead",
    "OptimizedModule": "give the model to optimize() before torch.compile",
    "ScriptModule": "give the model to optimize() before torch.jit",
}


def optimize(model: Any, *, dtype: torch.dtype | None = None, check: bool = True) -> Optimization:
    """Make a SAM, or any model with SAM's image encoder inside, use this library's operators, in place.

    It serves training and inference. The image encoder's attention never materialises its probabilities or
    bias, and its windows are neither copied nor padded; the mask decoder's upscaling is one operator, and
    masks are made without logits of the frame's size. Parameters, buffers and the state dict stay the same.
    Sub-modules are called as before, so hooks, wrappers (LoRA's, quantised layers) and later changes of
    weights still work; only the upscaling's modules are read, not called. The modules of a windowed
    attention get the whole grid, not windows; a wrapped or hooked `qkv` is first called on one token of zeros,
    which tells what padding becomes. Gradients are those of the original, including the zeros that
    DistributedDataParallel waits for.

    On a CPU, linear layers are packed for inference, and frozen ones for training; and packed again after their weights change.
    Changes that torch's version counter records are always seen. Changes that it misses
    (`p.data.mul_()`, `torch._foreach_*`, a mean teacher's loop, FSDP's flat parameters) are seen if a
    whole row or column changes; write smaller ones in place under `torch.no_grad()`.

    Outputs differ by the order of sums: in float32 features by at most 1e-5 of their largest value,
    logits of masks by 1e-4, and masks only where a logit is within 1e-5 of the threshold, relative to
    the largest logit; in bfloat16, features have at most twice the original's error.

    With dtype=torch.int8, where a CPU computes without autograd, the linear layers of the blocks are in 8-bit integers
    (`int8_linear`), attention is in bfloat16 on CPUs that multiply it: faster, and off by some percent. Layers that
    are wrapped or hooked stay as they are.

    Args:
        model: a module of any class with blocks as segment-anything, detectron2 (ViTDet), timm and
            transformers write them, with or without SAM's mask decoder, or the decoder alone; or
            segment-anything's `SamPredictor` or `SamAutomaticMaskGenerator`, the `sam2` library's
            `SAM2ImagePredictor` or `SAM2AutomaticMaskGenerator`, or one of transformers'
            processors of SAM; segment-anything's generator and processors then refuse logits that are not finite.
            `python -m refsam_kernels.integrations --list` lists the models. Any dtype, device and size.
        dtype: torch.int8, or None for the model's own.
        check: whether to compare each kind of block before and after, on a few random tokens.

    Returns:
        The handle whose `undo()` restores the model. Where transformers' `output_attentions` asks an eager
        attention for weights, its own code computes them; a warning says so once. So it is under torch.func's
        transforms and forward-mode derivatives.

    Raises:
        ValueError: the model has no such part, was optimized already, is on the meta device, differs inside (adapters in a block,
            dropout in attention, pooled queries, no relative positions), computes something else, or comes from
            a version of its library whose methods take other arguments; it is unchanged then.
    """
    is_known = dtype in (None, torch.int8)
    require(is_known, "dtype", dtype, "torch.int8, or None for the model's own")
    found = _replacements(model, check, dtype == torch.int8)
    if dtype == torch.int8:
        parts = [part for item in found for part in getattr(item.function, "args", ())]
        is_served = any(isinstance(part, Int8Attend) for part in parts)
        got = f"torch.int8 for a {type(model).__name__} without SAM's image encoder"
        require(is_served, "dtype", got, "a model that has one")
        say_if_slow()
    return Optimization(found)


def _replacements(model: Any, check: bool, in_int8: bool) -> list[Replacement]:
    """All replacements in a model or in what holds one. Raises `ValueError` where there are none."""
    names = [parent.__name__ for parent in type(model).__mro__]
    holder = next((name for name in names if name in HOLDERS), None)
    if holder:
        found, held = HOLDERS[holder](model, "model"), HELD.get(holder)
        if held:
            found += _of_module(attrgetter(held)(model), f"model.{held}", check, in_int8)
        return found
    is_module = isinstance(model, nn.Module) and not {"OptimizedModule", "ScriptModule"} & {*names}
    found = _of_module(model, "model", check, in_int8) if is_module else []
    require(bool(found), "model", f"a {names[0]}", _WANTED + _advice(names))
    return found


def _of_module(model: nn.Module, path: str, check: bool, in_int8: bool) -> list[Replacement]:
    """The replacements in a module and all below it."""
    parts = list(_parts(model, path))
    refuse([reason for where, _, part in parts for reason in loading_reasons(where, part)])
    found = [item for where, kind, module in parts for item in _of_part(where, kind, module)]
    blocks = find_blocks(model, path)
    refuse([reason for block in blocks for reason in block.reasons()])
    refuse([reason for item in found for reason in item.reasons()])
    if check:
        _check(blocks, parts)
    of_blocks = _each_once(item for block in blocks for item in block.replacements(in_int8))
    return found + of_blocks + (list(norm_replacements(model, path)) if blocks else [])


def _each_once(items: Iterable[Replacement]) -> list[Replacement]:
    """The replacements, but one for a layer that several modules share."""
    return list({(id(item.module), item.method): item for item in items}.values())


def _parts(model: nn.Module, path: str) -> Iterator[tuple[str, str, Any]]:
    """Modules of known names: where each stands, by which name it is known, and itself."""
    for name, module in model.named_modules():
        for parent in type(module).__mro__:
            if parent.__name__ in PARTS:
                yield (f"{path}.{name}" if name else path), parent.__name__, module
                break


def _of_part(path: str, kind: str, module: Any) -> list[Replacement]:
    try:
        return PARTS[kind](module, path)
    except ValueError as error:
        advice = _advice(type(part).__name__ for part in module.children())
        raise ValueError(f"{error}{advice}") from None


@torch.no_grad()
def _check(blocks: list[Block], parts: list[tuple[str, str, Any]]) -> None:
    """Raises `ValueError` unless decoders, and one block of each kind, compute the same before and after."""
    different = {block.likeness: block for block in reversed(blocks)}
    reasons: list[str] = []
    for block in reversed(different.values()):
        refuse([reason for item in block.replacements() for reason in item.reasons()])
        with torch.autocast(block.attention.rel_pos_h.device.type, enabled=False):
            reasons += block_reasons(block)
    for path, kind, module in parts:
        if kind in EXAMPLES:
            with torch.autocast(module.mask_tokens.weight.device.type, enabled=False):
                reasons += decoder_reasons(path, module, EXAMPLES[kind], PARTS[kind])
    refuse(reasons)


def _advice(class_names: Iterator[str] | list[str]) -> str:
    """Advice for models of these classes, appended to the error that refuses them."""
    return "".join(f" ({_ADVICE[name]})" for name in class_names if name in _ADVICE)
