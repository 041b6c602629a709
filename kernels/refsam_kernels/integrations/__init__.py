"""Makes other libraries' SAM faster in place: segment-anything's and transformers'.

Classes are recognised by their names and checked by their parts; none of these libraries is imported.
"""

from collections.abc import Callable

from torch import nn

from refsam_kernels.arguments import require
from refsam_kernels.integrations import segment_anything, transformers
from refsam_kernels.integrations.replacement import Optimization, Replacement

__all__ = ["Optimization", "optimize"]

MODELS: dict[str, Callable[[nn.Module], list[Replacement]]] = {
    "Sam": segment_anything.replacements,
    "ImageEncoderViT": segment_anything.replacements,
    "SamModel": transformers.replacements,
    "SamVisionModel": transformers.replacements,
    "SamVisionEncoder": transformers.replacements,
}


def optimize(model: nn.Module) -> Optimization:
    """Makes a SAM compute with this library's operators, in place, in training as in inference.

    The image encoder's attention never makes its weights or bias, and its windows are neither copied
    nor padded. Parameters, buffers and the state dict stay what they are; sub-modules are called as
    before, so their hooks and later changes of their weights are heeded. Gradients are those of the
    original. Outputs differ by the order of sums: at most 1e-5 of the largest value in float32, in
    bfloat16 at most twice what the original is off.

    Args:
        model: segment-anything's `Sam` or `ImageEncoderViT`, transformers' `SamModel`, `SamVisionModel`
            or `SamVisionEncoder` (attention eager or SDPA), or a subclass; any dtype, device and size.

    Returns:
        The handle whose `undo()` restores the model. transformers' `output_attentions` has nothing to
        give until then.

    Raises:
        ValueError: the model is of another kind, was optimized already, or differs inside from the class
            that it is named after (adapters, dropout in attention, no relative positions); it is
            unchanged then.
    """
    require(isinstance(model, nn.Module), "model", f"a {type(model).__name__}", "a torch.nn.Module")
    names = [parent.__name__ for parent in type(model).__mro__]
    known = [name for name in names if name in MODELS]
    require(bool(known), "model", f"a {names[0]}", f"one of {', '.join(MODELS)}")
    return Optimization(MODELS[known[0]](model))
