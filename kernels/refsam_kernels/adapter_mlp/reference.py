"""The formula of `adapter_mlp`, in segment-anything's order of operations."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.feed_forward import layer_norm
from refsam_kernels.registration import gradients_by_vjp, or_empty


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
    """x and its layer norm; for the backward, the MLP's and the adapter's values before the GELU."""
    normed_next = adapter_hidden = None
    hidden = F.linear(normed, fc1_weight, fc1_bias)
    x = residual + F.linear(F.gelu(hidden), fc2_weight, fc2_bias)
    if adapter_fc1_weight is not None and adapter_fc2_weight is not None:
        adapter_hidden = F.linear(normed, adapter_fc1_weight, adapter_fc1_bias)
        adapted = F.linear(F.gelu(adapter_hidden), adapter_fc2_weight, adapter_fc2_bias)
        x = x + scale * adapted
    if norm_weight is not None and norm_bias is not None:
        normed_next = layer_norm(x, norm_weight, norm_bias, eps).to(normed.dtype)
    saved = (hidden, adapter_hidden) if keep else (None, None)
    return x.contiguous(), *(or_empty(tensor, normed) for tensor in (normed_next, *saved))


def backward(grad_x: Tensor, grad_normed: Tensor, *arguments: Any) -> list[Tensor]:
    """One gradient for each of the forward's tensors."""
    *tensors, _x, _hidden, _adapter_hidden, scale, eps, needs = arguments
    formula = partial(forward, scale=scale, eps=eps, keep=False)
    return list(gradients_by_vjp(formula, tensors, needs, (grad_x, grad_normed)))
