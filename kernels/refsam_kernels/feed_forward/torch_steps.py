"""The steps between the matrix products of `adapter_mlp` and `adapter_projection`, in plain PyTorch.

Sums with a layer norm and the GELU, forward and backward; `Steps` lists what a backend can replace.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_dtype(residual: Tensor, operand: Tensor) -> torch.dtype:
    """The dtype of the residual stream after an operand was added: the wider one."""
    return torch.promote_types(residual.dtype, operand.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer norm over the last dimension, and torch's mean and inverse deviation (..., 1) of each row.

    x and the parameters may differ in dtype; all results have the wider one.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.native_layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation (..., 1) over the last dimension, at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return mean, (variance + eps).rsqrt()


def empty_statistics(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Memory for `row_statistics` of x; without elements where they are not kept."""
    shape = (*x.shape[:-1], 1) if keep else (0,)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


class Sum(NamedTuple):
    """The arguments of `add_and_norm`: `residual + first + scale * second`, then a layer norm; `keep` asks for its statistics."""

    residual: Tensor
    first: Tensor
    second: Tensor | None
    scale: float
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    keep: bool


class Normed(NamedTuple):
    """A sum x, its layer norm or None, and `row_statistics`, without elements where they are not kept."""

    x: Tensor
    normed: Tensor | None
    mean: Tensor
    rstd: Tensor


class SumBackward(NamedTuple):
    """The arguments of `add_and_norm_backward`; `dtype` is that of the products, `needs_norm` asks for the norm's parameters."""

    grad_x: Tensor
    grad_normed: Tensor
    x: Tensor
    mean: Tensor
    rstd: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    dtype: torch.dtype
    needs_column_sum: bool
    needs_norm: Sequence[bool]


class SumGradients(NamedTuple):
    """Gradients of `add_and_norm`, None where not needed.

    For the sum: `total` (rows, D) in x's dtype, `operand` (rows, D) in the products' dtype, possibly the same tensor, and
    `column_sum` (D,), the gradient of a bias within the sum. For the layer norm: the gradients of its parameters.
    """

    total: Tensor
    operand: Tensor
    column_sum: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class Steps(NamedTuple):
    """One backend's steps; each field stands for the function of this module with its name."""

    hidden_layer: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    add_and_norm: Callable[[Sum], Normed]
    add_and_norm_backward: Callable[[SumBackward], SumGradients]
    gelu_backward: Callable[[Tensor, Tensor, bool, bool], tuple[Tensor | None, Tensor | None]]


def hidden_layer(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """`weight x + bias` (..., H) and its GELU, which overwrites it if it is not to be kept."""
    hidden = F.linear(x, weight, bias)
    return hidden, F.gelu(hidden) if keep else torch.ops.aten.gelu_(hidden)


def add_and_norm(terms: Sum) -> Normed:
    """`x = residual + first + scale * second` and its layer norm in first's dtype, (..., D) all.

    `first` may be overwritten. A `second` of zeros changes no bit.
    """
    residual, first, second, scale, norm_weight, norm_bias, eps, keep = terms
    # Converted before it is added: a sum of two dtypes takes a CPU several times as long.
    x = first.to(sum_dtype(residual, first)).contiguous().add_(residual)
    if second is not None:
        x.add_(second, alpha=scale)
    if norm_weight is None or norm_bias is None:
        return Normed(x, None, *empty_statistics(x, False))
    normed, mean, rstd = layer_norm(x, norm_weight, norm_bias, eps)
    normed = normed.to(first.dtype)
    if not keep:
        return Normed(x, normed, *empty_statistics(x, False))
    if mean.dtype.itemsize < 4:  # as on a CPU if all is bfloat16
        mean, rstd = row_statistics(x, eps)
    return Normed(x, normed, mean, rstd)


def add_and_norm_backward(inputs: SumBackward) -> SumGradients:
    """Gradients of `add_and_norm`, in new memory."""
    grad_x, grad_normed, x, mean, rstd, norm_weight, norm_bias, *_ = inputs
    grad_norm: Sequence[Tensor | None] = (None, None)
    if norm_weight is None or norm_bias is None:
        total = grad_x.clone(memory_format=torch.contiguous_format)
    else:
        wide = mean.dtype
        grad, values, weight, bias = (
            tensor.to(wide) for tensor in (grad_normed, x, norm_weight, norm_bias)
        )
        total, *grad_norm = torch.ops.aten.native_layer_norm_backward(
            grad, values, weight.shape, mean, rstd, weight, bias, [True, *inputs.needs_norm]
        )
        total = total.add_(grad_x).to(x.dtype)
    total = rows(total)
    operand = total.to(inputs.dtype)
    column_sum = operand.sum(0) if inputs.needs_column_sum else None
    return SumGradients(total, operand, column_sum, *grad_norm)


def gelu_backward(
    grad: Tensor, hidden: Tensor, needs_activated: bool, needs_column_sum: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Turns the gradient (rows, H) of `gelu(hidden)` into that of hidden, in place.

    Returns gelu(hidden) and the sum (H,) of the new gradient over the rows, None where not needed.
    """
    activated = F.gelu(hidden) if needs_activated else None
    torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    return activated, grad.sum(0) if needs_column_sum else None


TORCH_STEPS = Steps(hidden_layer, add_and_norm, add_and_norm_backward, gelu_backward)


def rows(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C)."""
    return tensor.reshape(-1, tensor.shape[-1])
