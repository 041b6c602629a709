"""The formula of `adapter_projection`, in segment-anything's order of operations."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.registration import gradients_by_vjp
from refsam_kernels.feed_forward.mlp import empty_kept, kept_of
from refsam_kernels.feed_forward.torch_steps import (
    empty_statistics,
    layer_norm,
    row_statistics,
)


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
    """x and its layer norm; for the backward, the norm's statistics, and with an adapter the projection and what it keeps."""
    projected = F.linear(attention, weight, bias)
    adapted = projected
    saved: tuple[Tensor, ...] = (attention.new_empty(0), *empty_kept(projected, None, keep))
    if adapter_fc1_weight is not None and adapter_fc2_weight is not None:
        hidden = F.linear(projected, adapter_fc1_weight, adapter_fc1_bias)
        activated = F.gelu(hidden)
        adapted = projected + F.linear(activated, adapter_fc2_weight, adapter_fc2_bias)
        saved = (projected, *kept_of(hidden, activated, keep)) if keep else saved
    x = residual + adapted
    normed = layer_norm(x, norm_weight, norm_bias, eps)[0].to(attention.dtype)
    statistics = row_statistics(x, eps) if keep else empty_statistics(x, False)
    return x.contiguous(), normed, *statistics, *saved


def backward(grad_x: Tensor, grad_normed: Tensor, *arguments: Any) -> list[Tensor]:
    """One gradient for each of the forward's tensors."""
    *inputs, eps, needs = arguments
    tensors = inputs[:10]
    formula = partial(forward, eps=eps, keep=False)
    return list(gradients_by_vjp(formula, tensors, needs, (grad_x, grad_normed)))
