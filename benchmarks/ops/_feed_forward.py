"""Shared by adapter_mlp and adapter_projection: sizes and inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops._eager import Function, Tensors, against_eager
from benchmarks.registry import Workload


@dataclass(frozen=True)
class Setting:
    """Tokens (frames, tokens, width) whose products are in `dtype`, beside a float32 residual stream; what is trained."""

    name: str
    frames: int
    tokens: int
    width: int
    dtype: torch.dtype
    trains: Callable[[str], bool] | None = None  # parameters by name; None: inference

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frames, self.tokens, self.width


def is_adapter(name: str) -> bool:
    """Whether a tensor is one of the adapter's parameters, or one that a block below it passes gradients to."""
    return name.startswith("adapter") or name in ("normed", "attention", "residual")


SETTINGS = (
    Setting("ViT-B, 1 image, float32", 1, 4096, 768, torch.float32),
    Setting("ViT-B, 1 image, bfloat16", 1, 4096, 768, torch.bfloat16),
    Setting("ViT-B, 1 image, adapters trained, bfloat16", 1, 4096, 768, torch.bfloat16, is_adapter),
    Setting("nano, 8 frames, all trained, float32", 8, 576, 128, torch.float32, lambda _: True),
    Setting("nano, 8 frames, all trained, bfloat16", 8, 576, 128, torch.bfloat16, lambda _: True),
)


class Random:
    """Seeded tensors of a setting, drawn on the device; products' operands in its dtype."""

    def __init__(self, setting: Setting, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(42)
        self.dtype, self.device = setting.dtype, device

    def operand(self, *shape: int, size: float = 1.0) -> Tensor:
        """Normally distributed values in the dtype of the products."""
        return self.stream(*shape, size=size).to(self.dtype)

    def stream(self, *shape: int, size: float = 1.0) -> Tensor:
        """Normally distributed float32 values."""
        return size * torch.randn(shape, generator=self.generator, device=self.device)

    def perceptron(self, width: int, hidden: int, prefix: str = "") -> dict[str, Tensor]:
        """Two linear layers, width -> hidden -> width."""
        shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
        names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        return {
            prefix + name: self.operand(*shape, size=shape[-1] ** -0.5)
            for name, shape in zip(names, shapes, strict=True)
        }

    def norm(self, width: int) -> dict[str, Tensor]:
        """A layer norm's parameters."""
        return {
            "norm_weight": 1 + self.stream(width, size=0.1),
            "norm_bias": self.stream(width, size=0.1),
        }


def workload(
    operator: str,
    function: Function,
    eager: Function,
    setting: Setting,
    inputs: dict[str, Tensor],
    flops: int,
) -> Workload:
    """`function(..., backend=)` against `eager`; `flops` are the forward's."""
    if setting.trains is not None:
        for name, tensor in inputs.items():
            tensor.requires_grad_(setting.trains(name))
        flops = trained_flops(flops, setting, inputs)
    shapes = {"tokens": list(setting.shape), "dtype": str(setting.dtype)}
    return against_eager(
        operator, eager, function, inputs, flops=flops, shapes=shapes, dtype=setting.dtype
    )


def trained_flops(flops: int, setting: Setting, inputs: Tensors) -> int:
    """Forward and backward: the tokens' gradient takes as much as the forward, each trained matrix's one product more."""
    matrices = sum(x.numel() for x in inputs.values() if x.requires_grad and x.dim() == 2)
    return 2 * flops + 2 * setting.frames * setting.tokens * matrices
