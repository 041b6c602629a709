"""Random problems of the operators at ViT-B's size, tiny in a rehearsal, drawn on the device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report.machine import IS_REHEARSAL
from refsam_kernels import (
    AdapterWeights,
    AttentionWeights,
    adapter_mlp,
    adapter_projection,
    dense_attention,
    mask_loss,
    mask_postprocess,
    mask_upscale,
    rel_pos_attention,
    token_image_attention,
)
from refsam_kernels.core.dispatch import BackendError

MLP = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
NAN = float("nan")


@dataclass
class Problem:
    """One call of an operator: tensors by name, float32; `trained` are those whose gradients are wanted.

    `zero` names gradients that are mathematically zero, and the tensor whose gradient says how large their error may be.
    Of bool results a share of `undecided` may differ.
    """

    operator: str
    name: str
    function: Callable[..., tuple[Tensor, ...]]
    tensors: dict[str, Tensor]
    trained: tuple[str, ...] = ()
    zero: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = ()
    undecided: float = 1e-4

    def weight_of(self, output: Tensor) -> Tensor:
        """The random weights that make a loss of an output, always the same."""
        generator = torch.Generator(output.device).manual_seed(1)
        return torch.randn(output.shape, generator=generator, device=output.device)

    def reasons(self, dtype: torch.dtype, backend: str) -> str:
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

    def can_run(self, dtype: torch.dtype, backend: str) -> bool:
        """Whether the backend takes such tensors."""
        return not self.reasons(dtype, backend)


class Source:
    """Seeded normal values, drawn on the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(42)

    def __call__(self, *shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=self.generator, device=self.device)

    def linear(self, out: int, width: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
        """A layer's weight and bias."""
        return self(out, width, size=size * width**-0.5), self(out, size=0.1)


def problems_of(operator: str, device: str) -> list[Problem]:
    """The operator's problems."""
    return list(MAKERS[operator](Source(device)))


def rel_pos(source: Source) -> list[Problem]:
    """One image, global and in windows of which some are padded."""
    grid, heads, head_dim, window = (5, 1, 32, 3) if IS_REHEARSAL else (64, 12, 64, 14)
    problems = []
    for name, side in (("global", 0), ("windows", window)):
        width, size = heads * head_dim, side or grid
        tensors = {
            "qkv": source(1, grid, grid, 3 * width),
            "rel_pos_h": source(2 * size - 1, head_dim, size=0.3),
            "rel_pos_w": source(2 * size - 1, head_dim, size=0.3),
        }
        if side:
            tensors["qkv_bias"] = source(3 * width)
        attend = partial(rel_pos_attention, num_heads=heads, window_size=side)
        call = lambda attend=attend, **x: (attend(**x),)  # noqa: E731
        problems.append(Problem("rel_pos_attention", name, call, tensors, tuple(tensors)))
    return problems


def mlp_tensors(source: Source, width: int) -> dict[str, Tensor]:
    """Tokens, adapter and norm that the two adapter operators share."""
    tokens = 40 if IS_REHEARSAL else 4096
    up, down = source.linear(width // 4, width), source.linear(width, width // 4)
    return {
        "residual": source(1, tokens, width),
        **{f"adapter_{n}": x for n, x in zip(MLP, (*up, *down), strict=True)},
        "norm_weight": 1 + source(width, size=0.1),
        "norm_bias": source(width, size=0.1),
    }


def adapter_mlps(source: Source) -> list[Problem]:
    """An MLP of four times the width with its adapter."""
    width = 32 if IS_REHEARSAL else 768
    shared = mlp_tensors(source, width)
    layers = (*source.linear(4 * width, width), *source.linear(width, 4 * width))
    tensors = {"normed": source(*shared["residual"].shape), **shared}
    tensors |= dict(zip(MLP, layers, strict=True))

    def call(backend: str | None, **x: Any) -> tuple[Tensor, ...]:
        adapter = AdapterWeights(*(x.pop(f"adapter_{name}") for name in MLP))
        normed, residual = x.pop("normed"), x.pop("residual")
        return adapter_mlp(normed, residual, adapter=adapter, backend=backend, **x)  # type: ignore[return-value]

    return [Problem("adapter_mlp", "ViT-B", call, tensors, tuple(tensors))]


def adapter_projections(source: Source) -> list[Problem]:
    """The attention's projection with its adapter."""
    width = 32 if IS_REHEARSAL else 768
    shared = mlp_tensors(source, width)
    weight, bias = source.linear(width, width)
    tensors = {"attention": source(*shared["residual"].shape), "weight": weight, "bias": bias}
    tensors |= shared

    def call(backend: str | None, **x: Any) -> tuple[Tensor, ...]:
        adapter = AdapterWeights(*(x.pop(f"adapter_{name}") for name in MLP))
        return adapter_projection(**x, adapter=adapter, backend=backend)

    return [Problem("adapter_projection", "ViT-B", call, tensors, tuple(tensors))]


def dense(source: Source) -> list[Problem]:
    """Four levels, eight expressions of different lengths; padding words are NaN."""
    pixels, channels, count, words = (37, 32, 2, 5) if IS_REHEARSAL else (4096, 256, 8, 12)
    text = source(count, words, channels)
    lengths = (torch.arange(count, device=source.device) % (words - 2)) + 2
    text[torch.arange(words, device=source.device) >= lengths[:, None]] = NAN
    tensors = {
        "features": torch.nn.functional.normalize(source(4, 1, pixels, channels), dim=-1),
        "text": torch.nn.functional.normalize(text, dim=-1),
        "lengths": lengths,
        "image_index": torch.zeros_like(lengths),
        "weight": source(channels, 2 * channels, size=channels**-0.5),
        "bias": source(channels),
        "scale": torch.tensor(10.0, device=source.device),
        "level_weights": source(4).softmax(0),
    }
    call = lambda **x: (dense_attention(**x),)  # noqa: E731
    trained = ("features", "weight", "bias", "scale", "level_weights")
    return [Problem("dense_attention", "8 expressions", call, tensors, trained)]


def token_image(source: Source) -> list[Problem]:
    """Both directions; tokens behind a length are NaN where they are keys."""
    pixels, channels, count, tokens, heads = (
        (37, 32, 2, 5, 2) if IS_REHEARSAL else (4096, 256, 8, 15, 8)
    )
    internal = channels // 2
    problems = []
    for name, to_image in (("tokens to image", True), ("image to tokens", False)):
        image, image_pe = source(count, pixels, channels), source(1, pixels, channels)
        few, few_pe = source(count, tokens, channels), source(count, tokens, channels)
        sides = (few, few_pe, image, image_pe) if to_image else (image, image_pe, few, few_pe)
        tensors = dict(zip(("queries", "query_pe", "keys", "key_pe"), sides, strict=True))
        for part, shape in (("q", 1), ("k", 1), ("v", 1), ("out", 0)):
            sizes = (internal, channels) if shape else (channels, internal)
            tensors[f"{part}_weight"], tensors[f"{part}_bias"] = source.linear(*sizes)
        tensors |= {"norm_weight": 1 + source(channels, size=0.1), "norm_bias": source(channels)}
        trained = tuple(name for name in tensors if not name.endswith("_pe"))
        if not to_image:
            lengths = (torch.arange(count, device=source.device) % (tokens - 2)) + 2
            padding = torch.arange(tokens, device=source.device) >= lengths[:, None]
            tensors["keys"][padding] = NAN
            tensors["key_lengths"] = lengths
            trained = tuple(name for name in trained if name != "keys")

        def call(backend: str | None, **x: Any) -> tuple[Tensor, ...]:
            weights = AttentionWeights(*(x.pop(name) for name in AttentionWeights._fields))
            options = {"weights": weights, "num_heads": heads, "backend": backend}
            return (token_image_attention(**x, **options),)  # type: ignore[arg-type]

        zero = {"gradient of k_bias": "q_bias"}
        problems.append(Problem("token_image_attention", name, call, tensors, trained, zero))
    return problems


def upscale(source: Source) -> list[Problem]:
    """Eight expressions' features to logits of four times the size."""
    count, side, width = (2, 5, 32) if IS_REHEARSAL else (8, 64, 256)
    middle, last = width // 4, width // 8
    tensors = {
        "features": source(count, side, side, width),
        "hyper": source(count, 1, last),
        "conv1_weight": source(width, middle, 2, 2, size=width**-0.5),
        "conv1_bias": source(middle, size=0.1),
        "norm_weight": 1 + source(middle, size=0.1),
        "norm_bias": source(middle, size=0.1),
        "conv2_weight": source(middle, last, 2, 2, size=middle**-0.5),
        "conv2_bias": source(last, size=0.1),
    }
    call = lambda backend, **x: (mask_upscale(*x.values(), backend=backend),)  # noqa: E731
    return [Problem("mask_upscale", "8 expressions", call, tensors, tuple(tensors))]


def smooth(source: Source, masks: int, side: int) -> Tensor:
    """Smooth logits (masks, side, side), as a decoder gives them."""
    coarse = source(masks, 1, 8, 8)
    return 8 * torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[:, 0]


def sizes() -> dict[str, Any]:
    """The image's sizes for the two mask operators."""
    small = {"image_size": 32, "input_size": (18, 32)}
    return small if IS_REHEARSAL else {"image_size": 1024, "input_size": (576, 1024)}


def postprocess(source: Source) -> list[Problem]:
    """Eight masks to 1080p."""
    masks, side, output = (2, 8, (27, 48)) if IS_REHEARSAL else (8, 256, (1080, 1920))
    tensors = {"logits": smooth(source, masks, side)}

    def call(backend: str | None, logits: Tensor) -> tuple[Tensor, ...]:
        return (mask_postprocess(logits, **sizes(), output_size=output, backend=backend),)

    dtypes = (torch.float32,)
    return [Problem("mask_postprocess", "8 masks to 1080p", call, tensors, dtypes=dtypes)]


def loss(source: Source) -> list[Problem]:
    """Focal and dice loss of four masks at 480p."""
    masks, side, size = (2, 8, (27, 48)) if IS_REHEARSAL else (4, 256, (480, 854))
    tensors = {"logits": smooth(source, masks, side), "targets": source(masks, *size) > 0}

    def call(backend: str | None, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return mask_loss(logits, targets, **sizes(), backend=backend)

    dtypes = (torch.float32,)
    return [Problem("mask_loss", "4 masks at 480p", call, tensors, ("logits",), dtypes=dtypes)]


MAKERS: dict[str, Callable[[Source], list[Problem]]] = {
    "rel_pos_attention": rel_pos,
    "adapter_mlp": adapter_mlps,
    "adapter_projection": adapter_projections,
    "dense_attention": dense,
    "token_image_attention": token_image,
    "mask_upscale": upscale,
    "mask_postprocess": postprocess,
    "mask_loss": loss,
}
