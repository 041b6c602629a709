"""`dense_attention` in Triton: its launches; see `kernels`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from refsam_kernels.core.index_checks import valid_positions
from refsam_kernels.core.reasons import short
from refsam_kernels.core.triton_aot import DECODERS, CompileCase, Launch
from refsam_kernels.dense_attention.inputs import Inputs, kernel_reasons
from refsam_kernels.dense_attention.triton.kernels import (
    _forward_kernel,
    _image_backward_kernel,
    _text_backward_kernel,
)

not_supported_reasons = kernel_reasons


def forward(inputs: Inputs) -> Tensor:
    """Like `reference.forward`: products in the dtype of the features, sums and softmax in float32."""
    features, text, weight = inputs.features, inputs.text, inputs.weight.contiguous()
    dense = features.new_empty(len(text), *features.shape[2:])
    tensors = _tensors(inputs) | {"absorbed": F.linear(text, weight.chunk(2, dim=1)[1])}
    _forward_launch(tensors, weight, inputs.bias, dense).run()
    return dense


def backward(
    inputs: Inputs, outputs: None, grads: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Like `reference.backward`; the attention is computed again."""
    (grad,), weight = grads, inputs.weight.contiguous()
    attended = weight.chunk(2, dim=1)[1]
    is_word = valid_positions(inputs.lengths, inputs.text.shape[1]).unsqueeze(-1)
    text = torch.where(is_word, inputs.text, 0.0)
    tensors = _tensors(inputs._replace(text=text))
    tensors |= {"absorbed": F.linear(text, attended), "grad": grad.contiguous()}
    grad_text, grad_images = _text_outputs(tensors), _image_outputs(tensors, needs[0])
    _text_launch(tensors, grad_text).run()
    _image_launch(tensors, grad_text["grad_similarity"], grad_images, weight).run()
    bias, shares = inputs.bias.float(), inputs.level_weights.float()
    grad_absorbed = grad_text["grad_absorbed"].sum(0).to(text.dtype)
    grad_own = grad_images["grad_image"].flatten(0, 1).T @ grad_images["mixed"].flatten(0, 1)
    grad_attended = grad_absorbed.flatten(0, 1).T @ text.flatten(0, 1)
    grad_bias = grad.sum((0, 1), dtype=torch.float32)
    grad_shares = grad_text["grad_share"].sum((0, 1)) + grad_images["grad_share"].sum((0, 1))
    return (
        grad_images["grad_features"],
        grad_text["grad_text"].sum(0).add_(grad_absorbed @ attended),
        torch.cat([grad_own, grad_attended], dim=1),
        grad_bias * shares.sum(),
        grad_text["grad_scale"].sum(),
        grad_shares + grad_bias @ bias,
    )


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that all kernels read, by name."""
    named = inputs._asdict()
    names = ("features", "text", "lengths", "image_index", "scale", "level_weights")
    return {name: named[name].contiguous() for name in names}


def _tile(tensors: dict[str, Tensor]) -> tuple[int, dict[str, int]]:
    """The number of tiles of an image, and sizes and blocks that all kernels take; blocks are powers of two."""
    (levels, images, pixels, channels), (expressions, words, _) = (
        tensors[name].shape for name in ("features", "text")
    )
    blocks = {"WORDS": max(16, triton.next_power_of_2(words))}
    blocks["CHANNELS"] = max(16, triton.next_power_of_2(channels))
    # Float32 products have no tensor cores: their operands are held in registers, so tiles are smaller.
    is_single = tensors["features"].element_size() == 4
    crowded = blocks["CHANNELS"] > 256 or blocks["WORDS"] > 64
    blocks["PIXELS"] = 16 if is_single or crowded else 32
    blocks["COLUMNS"] = min(64, blocks["CHANNELS"])
    blocks["LEVELS"] = triton.next_power_of_2(tensors["features"].shape[0])
    sizes = {"levels": levels, "images": images, "expressions": expressions, "pixels": pixels}
    tiles = triton.cdiv(pixels, blocks["PIXELS"])
    return tiles, sizes | {"words": words, "channels": channels} | blocks


def _forward_launch(
    tensors: dict[str, Tensor], weight: Tensor, bias: Tensor, dense: Tensor
) -> Launch:
    tiles, sizes = _tile(tensors)
    if dense.element_size() == 4:
        sizes["COLUMNS"] = 16  # beside the mixtures no more fits the registers
    values = tensors | sizes | {"weight": weight, "bias": bias.contiguous(), "dense": dense}
    return Launch.choosing(_forward_kernel, (tiles, sizes["expressions"]), values)


def _text_outputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Uninitialised outputs of `_text_backward_kernel`."""
    tiles, sizes = _tile(tensors)
    text, (levels, _, pixels, _) = tensors["text"], tensors["features"].shape
    rows = (tiles, *text.shape)
    sums = (tiles, len(text), levels)
    shapes = {"grad_text": rows, "grad_absorbed": rows, "grad_scale": sums, "grad_share": sums}
    outputs = {name: text.new_empty(x, dtype=torch.float32) for name, x in shapes.items()}
    outputs["grad_similarity"] = text.new_empty(levels, len(text), pixels, sizes["WORDS"])
    return outputs


def _text_launch(tensors: dict[str, Tensor], outputs: dict[str, Tensor]) -> Launch:
    tiles, sizes = _tile(tensors)
    programs = (tiles, sizes["expressions"])
    return Launch.choosing(_text_backward_kernel, programs, tensors | outputs | sizes)


def _image_outputs(tensors: dict[str, Tensor], needs_features: bool) -> dict[str, Any]:
    """Uninitialised outputs of `_image_backward_kernel`."""
    tiles, _ = _tile(tensors)
    features = tensors["features"]
    levels, images = features.shape[:2]
    return {
        "grad_features": torch.empty_like(features) if needs_features else None,
        "grad_image": torch.empty_like(features[0]),
        "mixed": torch.empty_like(features[0]),
        "grad_share": features.new_empty(tiles, images, levels, dtype=torch.float32),
    }


def _image_launch(
    tensors: dict[str, Tensor],
    grad_similarity: Tensor,
    outputs: dict[str, Any],
    weight: Tensor,
) -> Launch:
    tiles, sizes = _tile(tensors)
    values = tensors | outputs | sizes | {"grad_similarity": grad_similarity, "weight": weight}
    return Launch.choosing(_image_backward_kernel, (tiles, sizes["images"]), values)


def compile_cases() -> list[CompileCase]:
    """SAM's prompt width and nano's, short and long expressions, in half and single precision."""
    cases = []
    for dtype, channels, words in DECODERS:
        features = torch.empty(4, 1, 4096, channels, dtype=dtype, device="meta")
        text = features.new_empty(8, words, channels)
        lengths = torch.empty(8, dtype=torch.int64, device="meta")
        weight, scale = features.new_empty(channels, 2 * channels), features.new_empty(())
        level_weights = features.new_empty(4, dtype=torch.float32)
        bias, scale = weight[0, :channels], scale.float()
        inputs = Inputs(features, text, lengths, lengths, weight, bias, scale, level_weights)
        tensors = _tensors(inputs)
        tensors |= {"absorbed": text, "grad": features.new_empty(8, 4096, channels)}
        grad_text = _text_outputs(tensors)
        similarity, grad_images = grad_text["grad_similarity"], _image_outputs(tensors, True)
        launches = {
            "forward": _forward_launch(tensors, weight, bias, tensors["grad"]),
            "text backward": _text_launch(tensors, grad_text),
            "image backward": _image_launch(tensors, similarity, grad_images, weight),
        }
        name = f"{short(dtype)}, {channels} channels, {words} words"
        cases += [launch.compile_case(f"{kind}, {name}") for kind, launch in launches.items()]
    return cases
