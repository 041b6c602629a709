"""Frozen linear layers in a training step on a CPU, with weights in oneDNN's own layout: what trains are adapters beside them.

Products with such weights are faster than torch's own; a layer that trains would have to be packed at each step.
"""

import copy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refsam_kernels.packed_linear import (
    LinearCopy,
    PackedLinear,
    can_prepack,
    is_followed,
    is_plain_linear,
    trains,
)

# Tokens that an MLP computes at a time beyond its first layer.
ROWS = 512


class FrozenLinear:
    """A linear layer of weight (out, in) and bias (out,) or None, packed twice: for the result and for the input's gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.product, self.transposed = PackedLinear(weight, bias), PackedLinear(weight.T, None)
        self._without_bias = copy.copy(self.product)
        self._without_bias.bias = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), both in the weights' dtype; differentiable with respect to `x`, any number of times."""
        result: Tensor = _Product.apply(x, self.product, self.transposed, self._without_bias)
        return result


class _Product(torch.autograd.Function):
    """`product(x)`; `gradient` makes the input's gradient of the output's, and `again` the gradient of that."""

    @staticmethod
    def forward(
        x: Tensor, product: PackedLinear, gradient: PackedLinear, again: PackedLinear
    ) -> Tensor:
        return product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gradient, ctx.again = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Product.apply(grad, ctx.gradient, ctx.again, ctx.gradient), None, None, None


def frozen_mlp(x: Tensor, first: FrozenLinear, second: FrozenLinear) -> Tensor:
    """`second(gelu(first(x)))` of (..., D), in the weights' dtype; the wide values before the GELU are kept for the backward.

    Differentiable once.
    """
    result: Tensor = _Mlp.apply(x.flatten(0, -2), first, second)
    return result.view(x.shape)


class _Mlp(torch.autograd.Function):
    """Of tokens (N, D), `ROWS` at a time, so that other wide values are in the cache, not in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: FrozenLinear, second: FrozenLinear) -> Tensor:
        wide, result = first.product(x), torch.empty_like(x)
        for part, target in zip(wide.split(ROWS), result.split(ROWS), strict=True):
            target.copy_(second.product(F.gelu(part)))
        ctx.save_for_backward(wide)
        ctx.layers = first, second
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (wide,), (first, second) = ctx.saved_tensors, ctx.layers
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        parts = (each.split(ROWS) for each in (wide, grad, result))
        for part, upper, target in zip(*parts, strict=True):
            slope = second.transposed(upper)
            torch.ops.aten.gelu_backward.grad_input(slope, part, grad_input=slope)
            target.copy_(first.transposed(slope))
        return result, None, None


class FrozenCopy(LinearCopy[FrozenLinear]):
    """A packed copy of a frozen linear module's weights, in their dtype or in autocast's."""

    def __init__(self) -> None:
        super().__init__(FrozenLinear)

    @staticmethod
    def is_supported(module: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
        """Whether it may stand for the module: a plain one that does not train, whose input does; torch packs such weights."""
        return (
            torch.is_grad_enabled()
            and x.requires_grad
            and is_plain_linear(module)
            and not trains(module)
            and not is_followed(x)
            and x.device.type == "cpu"
            and x.numel() > 0
            and can_prepack(module.weight, dtype_of_step(x))
            and (torch.is_autocast_enabled("cpu") or x.dtype == module.weight.dtype)
        )

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        """(..., in) to (..., out) in the dtype of x, or of autocast; `is_supported` must hold."""
        dtype = dtype_of_step(x)
        return self.of(module, dtype)(x.to(dtype))


def dtype_of_step(x: Tensor) -> torch.dtype:
    """In which a linear layer computes with x: its own, or autocast's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
