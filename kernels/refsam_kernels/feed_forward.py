"""What `adapter_mlp` and `adapter_projection` share: adapters, two-layer perceptrons, layer norms.

Token tensors are rows (·, D) here. The backwards are explicit: they compute the GELU again instead
of keeping its result, and skip what is not needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.arguments import check_shape, require
from refsam_kernels.registration import empty_gradients


class AdapterWeights(NamedTuple):
    """Parameters of an adapter `fc2(gelu(fc1(x)))` of H hidden channels: (H, D), (H,), (D, H), (D,)."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


NO_ADAPTER = (None, None, None, None)


def check_perceptron(weights: Mapping[str, Tensor], width: int) -> None:
    """Raises `ValueError` unless four tensors, by their names in messages, fit tokens of this width.

    Their order is that of `AdapterWeights`.
    """
    (first, fc1_weight), *others = weights.items()
    check_shape(first, fc1_weight, ("H", width))
    hidden = fc1_weight.shape[0]
    wanted = ((hidden,), (width, hidden), (width,))
    for (name, tensor), shape in zip(others, wanted, strict=True):
        check_shape(name, tensor, shape)


def named_adapter(adapter: AdapterWeights) -> dict[str, Tensor]:
    """The adapter's tensors by their names in messages."""
    return {f"adapter.{name}": tensor for name, tensor in adapter._asdict().items()}


def check_norm(weight: Tensor, bias: Tensor, x_dtype: torch.dtype, width: int) -> None:
    """Raises `ValueError` unless a layer norm's parameters fit x: its width, and its dtype or float32."""
    for name, tensor in (("norm_weight", weight), ("norm_bias", bias)):
        check_shape(name, tensor, (width,))
        fits = tensor.dtype in (x_dtype, torch.float32)
        require(fits, name, tensor.dtype, f"{x_dtype} as the sum has, or torch.float32")


def sum_dtype(residual: Tensor, operand: Tensor) -> torch.dtype:
    """The dtype of the residual stream after an operand was added: the wider one."""
    return torch.promote_types(residual.dtype, operand.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The layer norm over the last dimension; x and the parameters may differ in dtype."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)


def perceptron(x: Tensor, weights: Sequence[Any], *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """`fc2(gelu(fc1(x)))`, and with `keep` what the backward needs: the values before the GELU."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    hidden = F.linear(x, fc1_weight, fc1_bias)
    activated = F.gelu(hidden) if keep else torch.ops.aten.gelu_(hidden)
    return F.linear(activated, fc2_weight, fc2_bias), hidden if keep else None


def perceptron_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of `perceptron` for the gradient (rows, D) of its result.

    In the order x, fc1_weight, fc1_bias, fc2_weight, fc2_bias; no elements where `needs` is False.
    """
    activated = F.gelu(hidden) if needs[3] else hidden  # only the weight's gradient reads it
    second = linear_backward(grad, activated, fc2_weight, (any(needs[:3]), *needs[3:]))
    on_hidden = second[0]
    if any(needs[:3]):
        torch.ops.aten.gelu_backward.grad_input(on_hidden, hidden, grad_input=on_hidden)
    return [*linear_backward(on_hidden, x, fc1_weight, needs[:3]), *second[1:]]


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """Gradients of `x @ weight.T + bias` with respect to x, weight, bias; no elements where not needed."""
    return [
        grad @ weight if needs[0] else grad.new_empty(0),
        grad.T @ x if needs[1] else grad.new_empty(0),
        grad.sum(0) if needs[2] else grad.new_empty(0),
    ]


def rows(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C)."""
    return tensor.reshape(-1, tensor.shape[-1])


def shaped(
    gradients: Sequence[Tensor], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients in the tensors' shapes and dtypes, without elements where `needs` is False."""
    results = list(empty_gradients(tensors, [False] * len(needs)))
    for i, (gradient, tensor) in enumerate(zip(gradients, tensors, strict=True)):
        if tensor is not None and needs[i]:
            results[i] = gradient.view(tensor.shape).to(tensor.dtype)
    return results


def norm_and_sum_backward(
    grad_x: Tensor,
    grad_normed: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients with respect to x, a result and (if there is one) a layer norm's input, and the norm's parameters.

    x's is new memory, at least float32. The others have no elements where `needs` is False.
    """
    if norm_weight is None or norm_bias is None:
        total = grad_x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        return [total.contiguous(), x.new_empty(0), x.new_empty(0)]
    on_x, *on_norm = layer_norm_backward(
        grad_normed, x, norm_weight, norm_bias, eps, (True, *needs)
    )
    return [on_x.add_(grad_x), *on_norm]


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of `layer_norm` with respect to x, weight, bias; no elements where not needed.

    The statistics are computed again, at least in float32; so is the gradient of x returned.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, grad, weight, bias = (tensor.to(dtype) for tensor in (x, grad, weight, bias))
    _, mean, deviation = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    gradients = torch.ops.aten.native_layer_norm_backward(
        grad, x, weight.shape, mean, deviation, weight, bias, list(needs)
    )
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]
