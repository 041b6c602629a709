"""Frozen linear layers in a training step on a CPU, with weights in oneDNN's own layout: what trains are adapters beside them.

Products with such weights are faster than torch's own; a layer that trains would have to be packed at each step.
"""

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refsam_kernels.packed_linear import (
    LinearCopy,
    PackedCopy,
    PackedLinear,
    can_pack,
    dtype_of_call,
    trains,
)

# Tokens that an MLP computes at a time.
ROWS = 256


@dataclass(frozen=True)
class FrozenLinear:
    """A linear layer of weight (out, in) and bias (out,) or None, packed twice: for the result and for the input's gradient."""

    product: PackedLinear
    transposed: PackedLinear

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "FrozenLinear":
        """Pack these weights, as they are and transposed."""
        return cls(PackedLinear(weight, bias), _transposed(weight, bias))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), both in the weights' dtype; differentiable with respect to `x`, any number of times."""
        again = self.product.but(bias=None)
        result: Tensor = _Product.apply(x, self.product, self.transposed, again)
        return result


def _transposed(weight: Tensor, _: Tensor | None) -> PackedLinear:
    return PackedLinear(weight.T, None)


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
    """An MLP on tokens (N, D), `ROWS` at a time, so that hidden values stay in the cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: FrozenLinear, second: FrozenLinear) -> Tensor:
        result, wide = torch.empty_like(x), []
        for part, target in zip(x.split(ROWS), result.split(ROWS), strict=True):
            wide.append(first.product(part))
            target.copy_(second.product(F.gelu(wide[-1])))
        # Parts of their own fit where other tensors were freed.
        ctx.save_for_backward(*wide)
        ctx.layers = first, second
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        wide, (first, second) = ctx.saved_tensors, ctx.layers
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        parts = zip(wide, grad.split(ROWS), result.split(ROWS), strict=True)
        for part, upper, target in parts:
            slope = second.transposed(upper)
            torch.ops.aten.gelu_backward.grad_input(slope, part, grad_input=slope)
            target.copy_(first.transposed(slope))
        return result, None, None


class FrozenCopy:
    """A packed copy of a frozen linear module's weights, in their dtype or in autocast's; `packed` is a part of it."""

    def __init__(self, packed: PackedCopy) -> None:
        self._packed, self._transposed = packed, LinearCopy(_transposed)

    @staticmethod
    def is_supported(module: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
        """Whether it may compute for the module's `forward`: one that does not train, whose input does, and can be packed."""
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        return wants_gradient and can_pack(module, x) and not trains(module)

    def of(self, module: nn.Linear, dtype: torch.dtype) -> FrozenLinear:
        """The copy of the module's present weights, without what `packed` has behind the product."""
        product = self._packed.of(module, dtype).but(activation="none")
        return FrozenLinear(product, self._transposed.of(module, dtype))

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        """(..., in) to (..., out) in the dtype of x, or of autocast; `is_supported` must hold."""
        dtype = dtype_of_call(x)
        return self.of(module, dtype)(x.to(dtype))
