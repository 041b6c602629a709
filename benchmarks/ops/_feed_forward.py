"""Shared by adapter_mlp and adapter_projection: sizes, providers, the check of results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Workload, backends_of

Tensors = dict[str, Tensor]
# Of an error, relative to that of the eager formula in the same dtype; as in the tests.
FACTOR = 3
# Of the largest value: a few roundings of results that eager happens to hit exactly.
ROUNDINGS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


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

    def perceptron(self, width: int, hidden: int, prefix: str = "") -> Tensors:
        """Two linear layers, width -> hidden -> width."""
        shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
        names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        return {
            prefix + name: self.operand(*shape, size=shape[-1] ** -0.5)
            for name, shape in zip(names, shapes, strict=True)
        }

    def norm(self, width: int) -> Tensors:
        """A layer norm's parameters."""
        return {
            "norm_weight": 1 + self.stream(width, size=0.1),
            "norm_bias": self.stream(width, size=0.1),
        }


def run(function: Callable[..., tuple[Any, ...]], inputs: Tensors, grads: Tensors) -> Any:
    """The results, and of those that are trained the gradients."""
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    if not wanted:
        with torch.no_grad():
            return function(**inputs)
    results = function(**inputs)
    gradients = torch.autograd.grad(results, wanted, list(grads.values()))
    return *(result.detach() for result in results), *gradients


def workload(
    operator: str,
    function: Callable[..., tuple[Any, ...]],
    eager: Callable[..., tuple[Any, ...]],
    setting: Setting,
    inputs: Tensors,
    flops: int,
) -> Workload:
    """`function(..., backend=)` against `eager`, checked against eager in float64; `flops` are the forward's."""
    if setting.trains is not None:
        for name, tensor in inputs.items():
            tensor.requires_grad_(setting.trains(name))
    device = inputs["residual"].device.type
    random = Random(setting, device)
    grads = {"x": random.stream(*setting.shape), "normed": random.operand(*setting.shape)}
    ways: Mapping[str, Callable[..., tuple[Any, ...]]] = {"eager": eager} | {
        name: partial(function, backend=name)
        for name in backends_of(operator, device)
        if name != "reference"
    }
    exact = run(eager, *({n: exactly(t) for n, t in x.items()} for x in (inputs, grads)))
    plain = run(eager, inputs, grads)
    bounds = [bound(*pair, setting.dtype) for pair in zip(plain, exact, strict=True)]
    moved = sum(tensor.nbytes for tensor in (*inputs.values(), *plain))
    return Workload(
        providers={name: partial(run, way, inputs, grads) for name, way in ways.items()},
        wrong=partial(further_than_eager, exact=exact, bounds=bounds),
        moved_bytes=moved,
        flops=flops if setting.trains is None else trained_flops(flops, setting, inputs),
        shapes={"tokens": list(setting.shape), "dtype": str(setting.dtype)},
        dtype=setting.dtype,
    )


def trained_flops(flops: int, setting: Setting, inputs: Tensors) -> int:
    """Forward and backward: the tokens' gradient takes as much as the forward, each trained matrix's one product more."""
    matrices = sum(x.numel() for x in inputs.values() if x.requires_grad and x.dim() == 2)
    return 2 * flops + 2 * setting.frames * setting.tokens * matrices


def exactly(tensor: Tensor) -> Tensor:
    """The same values in float64."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def bound(found: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Largest allowed error of a result."""
    error = float((found.double() - exact).abs().max())
    return FACTOR * error + ROUNDINGS[dtype] * float(exact.abs().max())


def further_than_eager(
    found: tuple[Tensor, ...], *, exact: tuple[Tensor, ...], bounds: list[float]
) -> str | None:
    """In words which result or gradient is too far from the exact one."""
    for index, (tensor, wanted, most) in enumerate(zip(found, exact, bounds, strict=True)):
        error = float((tensor.double() - wanted).abs().max())
        if not error <= most:
            return f"result {index} is off by {error:.2e}, at most {most:.2e} may be"
    return None
