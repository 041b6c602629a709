"""Problems of the operators at ViT-B's size, tiny in a rehearsal: the inputs of `benchmarks.ops` in float32, padding NaN."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report.machine import IS_REHEARSAL
from benchmarks.ops import _feed_forward as feed_forward
from benchmarks.ops import (
    adapter_mlp,
    adapter_projection,
    dense_attention,
    mask_upscale,
    token_image_attention,
)
from benchmarks.ops import rel_pos_attention as attention
from benchmarks.ops._eager import Function
from benchmarks.ops.mask_postprocess import smooth_logits
from refsam_kernels import mask_loss, mask_postprocess, rel_pos_attention
from refsam_kernels.core.dispatch import BackendError

FLOAT32 = torch.float32
NAN = float("nan")


@dataclass
class Problem:
    """One call of an operator: tensors by name, float32; `trained` are those whose gradients are wanted.

    `zero` names gradients that are mathematically zero, and the tensor whose gradient says how large their error may be.
    Of bool results a share of `undecided` may differ.
    """

    operator: str
    name: str
    function: Function
    tensors: dict[str, Tensor]
    trained: tuple[str, ...] = ()
    zero: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = ()
    undecided: float = 1e-4

    def weight_of(self, output: Tensor) -> Tensor:
        """Random weights of an output in the loss, always the same."""
        generator = torch.Generator(output.device).manual_seed(1)
        return torch.randn(output.shape, generator=generator, device=output.device)

    def refusal(self, dtype: torch.dtype, backend: str) -> str:
        """Why the backend refuses such tensors, empty if it does not."""
        if IS_REHEARSAL and dtype == torch.bfloat16 and backend in ("", "triton"):
            return "Triton's interpreter cannot multiply bfloat16"
        tensors = {
            name: x.to(dtype) if x.is_floating_point() else x for name, x in self.tensors.items()
        }
        try:
            with torch.no_grad():
                self.function(backend=backend or None, **tensors)
        except BackendError as error:
            return str(error).partition("\n")[0]
        return ""


def problems_of(operator: str, device: str) -> list[Problem]:
    """The operator's problems."""
    return list(MAKERS[operator](device))


def rel_pos(device: str) -> list[Problem]:
    """One image: global attention, and windows, some of them padded."""
    grid, heads, head_dim, side = (5, 1, 32, 3) if IS_REHEARSAL else (64, 12, 64, 14)
    problems = []
    for name, window in (("global", 0), ("windows", side)):
        setting = attention.Setting(name, heads, head_dim, window, grid=grid, dtype=FLOAT32)
        tensors = setting.inputs(device)
        tensors["qkv"] = tensors["qkv"][:1]
        if not window:
            del tensors["qkv_bias"]  # it has no part in global attention
        call = partial(rel_pos_attention, num_heads=heads, window_size=window)
        problems.append(Problem("rel_pos_attention", name, call, tensors, tuple(tensors)))
    return problems


def with_adapter(operator: Any, device: str) -> list[Problem]:
    """An operator of the feed-forward with its adapter; `operator` is its module of `benchmarks.ops`."""
    tokens, width = (40, 32) if IS_REHEARSAL else (4096, 768)
    setting = feed_forward.Setting("ViT-B", 1, tokens, width, FLOAT32)
    tensors = operator.make_inputs(device, setting)
    name = operator.__name__.rpartition(".")[2]
    return [Problem(name, setting.name, operator.fused, tensors, tuple(tensors))]


def dense(device: str) -> list[Problem]:
    """Four levels, eight expressions of different lengths; padding words are NaN."""
    sizes = (1, 37, 32, 2) if IS_REHEARSAL else (1, 4096, 256, 8)
    tensors = dense_attention.make_inputs(device, *sizes, FLOAT32)
    fill_behind(tensors["text"], tensors["lengths"])
    trained = ("features", "weight", "bias", "scale", "level_weights")
    return [
        Problem(
            "dense_attention", "8 expressions", dense_attention.dense_attention, tensors, trained
        )
    ]


def token_image(device: str) -> list[Problem]:
    """Both directions; tokens behind a length are NaN where they are keys."""
    pixels, channels, count = (37, 64, 2) if IS_REHEARSAL else (4096, 256, 8)
    problems = []
    for name, to_image in (("tokens to image", True), ("image to tokens", False)):
        tensors = token_image_attention.make_inputs(
            device, pixels, channels, count, FLOAT32, to_image
        )
        call = partial(token_image_attention.fused, num_heads=channels // 32)
        fixed = {"query_pe", "key_pe", "key_lengths"}
        if to_image:
            call = partial(call, key_lengths=tensors.pop("key_lengths"))
        else:
            fixed.add("keys")
            fill_behind(tensors["keys"], tensors["key_lengths"])
        trained = tuple(name for name in tensors if name not in fixed)
        zero = {"gradient of k_bias": "q_bias"}
        problems.append(Problem("token_image_attention", name, call, tensors, trained, zero))
    return problems


def upscale(device: str) -> list[Problem]:
    """Eight expressions' features to logits of four times the size."""
    shape = (2, 5, 5, 32) if IS_REHEARSAL else (8, 64, 64, 256)
    tensors = mask_upscale.make_inputs(device, shape, FLOAT32)
    return [
        Problem("mask_upscale", "8 expressions", mask_upscale.mask_upscale, tensors, tuple(tensors))
    ]


def fill_behind(rows: Tensor, lengths: Tensor) -> None:
    """Fills what lies behind the lengths (P,) of rows (P, T, C) with NaN."""
    positions = torch.arange(rows.shape[1], device=rows.device)
    rows[positions >= lengths[:, None]] = NAN


def sizes() -> dict[str, Any]:
    """The image's sizes for the two mask operators."""
    small = {"image_size": 32, "input_size": (18, 32)}
    return small if IS_REHEARSAL else {"image_size": 1024, "input_size": (576, 1024)}


def postprocess(device: str) -> list[Problem]:
    """Eight masks to 1080p."""
    masks, side, output = (2, 8, (27, 48)) if IS_REHEARSAL else (8, 256, (1080, 1920))
    tensors = {"logits": smooth_logits(masks, device, side)}
    call = partial(mask_postprocess, **sizes(), output_size=output)
    return [Problem("mask_postprocess", "8 masks to 1080p", call, tensors, dtypes=(FLOAT32,))]


def loss(device: str) -> list[Problem]:
    """Focal and dice loss of four masks at 480p."""
    masks, side, size = (2, 8, (27, 48)) if IS_REHEARSAL else (4, 256, (480, 854))
    generator = torch.Generator(device).manual_seed(42)
    targets = torch.randn(masks, *size, generator=generator, device=device) > 0
    tensors = {"logits": smooth_logits(masks, device, side), "targets": targets}
    call = partial(mask_loss, **sizes())
    return [Problem("mask_loss", "4 masks at 480p", call, tensors, ("logits",), dtypes=(FLOAT32,))]


MAKERS: dict[str, Callable[[str], list[Problem]]] = {
    "rel_pos_attention": rel_pos,
    "adapter_mlp": partial(with_adapter, adapter_mlp),
    "adapter_projection": partial(with_adapter, adapter_projection),
    "dense_attention": dense,
    "token_image_attention": token_image,
    "mask_upscale": upscale,
    "mask_postprocess": postprocess,
    "mask_loss": loss,
}
