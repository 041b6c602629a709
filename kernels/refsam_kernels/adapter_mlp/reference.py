"""The formula of `adapter_mlp`, in segment-anything's order of operations."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.registration import gradients_by_vjp, or_empty
from refsam_kernels.feed_forward.mlp import empty_kept, kept_of
from refsam_kernels.feed_forward.torch_steps import (
    empty_statistics,
    layer_norm,
    row_statistics,
)


def forward(
    normed: Tensor,
    residual: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    adapter_fc1_weight: Tensor | None,
    adapter_fc1_bias: Tensor | None,
    adapter_fc2_weight: Tensor | None,
    adapter_fc2_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    """x and its layer norm; for the backward, the norm's statistics and what each perceptron keeps."""
    normed_next = None
    hidden = F.linear(normed, fc1_weight, fc1_bias)
    activated = F.gelu(hidden)
    x = residual + F.linear(activated, fc2_weight, fc2_bias)
    kept = kept_of(hidden, activated, keep)
    kept_by_adapter = empty_kept(normed, None, keep)
    if adapter_fc1_weight is not None and adapter_fc2_weight is not None:
        hidden = F.linear(normed, adapter_fc1_weight, adapter_fc1_bias)
        activated = F.gelu(hidden)
        x = x + scale * F.linear(activated, adapter_fc2_weight, adapter_fc2_bias)
        kept_by_adapter = kept_of(hidden, activated, keep)
    statistics = empty_statistics(x, False)
    if norm_weight is not None and norm_bias is not None:
        normed_next = layer_norm(x, norm_weight, norm_bias, eps)[0].to(normed.dtype)
        statistics = row_statistics(x, eps) if keep else statistics
    return x.contiguous(), or_empty(normed_next, normed), *statistics, *kept, *kept_by_adapter


def backward(grad_x: Tensor, grad_normed: Tensor, *arguments: Any) -> list[Tensor]:
    """One gradient for each of the forward's tensors."""
    *inputs, scale, eps, needs = arguments
    tensors = inputs[:12]
    formula = partial(forward, scale=scale, eps=eps, keep=False)
    return list(gradients_by_vjp(formula, tensors, needs, (grad_x, grad_normed)))
