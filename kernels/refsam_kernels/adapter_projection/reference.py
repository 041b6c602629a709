"""The formula of `adapter_projection`, in segment-anything's order of operations."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.feed_forward import layer_norm
from refsam_kernels.registration import gradients_by_vjp, or_empty


def forward(
    attention: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    adapter_fc1_weight: Tensor | None,
    adapter_fc1_bias: Tensor | None,
    adapter_fc2_weight: Tensor | None,
    adapter_fc2_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    """x and its layer norm; for an adapter's backward, the projection and its hidden values."""
    projected = F.linear(attention, weight, bias)
    adapted = projected
    saved: tuple[Tensor | None, ...] = (None, None)
    if adapter_fc1_weight is not None and adapter_fc2_weight is not None:
        hidden = F.linear(projected, adapter_fc1_weight, adapter_fc1_bias)
        adapted = projected + F.linear(F.gelu(hidden), adapter_fc2_weight, adapter_fc2_bias)
        saved = (projected, hidden) if keep else saved
    x = residual + adapted
    normed = layer_norm(x, norm_weight, norm_bias, eps).to(attention.dtype)
    return x.contiguous(), normed, *(or_empty(tensor, attention) for tensor in saved)


def backward(grad_x: Tensor, grad_normed: Tensor, *arguments: Any) -> list[Tensor]:
    """One gradient for each of the forward's tensors."""
    *tensors, _x, _projected, _hidden, eps, needs = arguments
    formula = partial(forward, eps=eps, keep=False)
    return list(gradients_by_vjp(formula, tensors, needs, (grad_x, grad_normed)))
