"""`adapter_projection` in plain PyTorch: sums in place, an explicit backward that skips what is frozen."""

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.feed_forward import (
    layer_norm,
    linear_backward,
    norm_and_sum_backward,
    perceptron,
    perceptron_backward,
    rows,
    shaped,
)
from refsam_kernels.registration import or_empty


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
    if adapter_fc1_weight is not None:
        adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
        adapted, hidden = perceptron(projected, adapter, keep=keep)
        adapted.add_(projected)
        saved = (projected, hidden) if keep else saved
    x = (residual + adapted).contiguous()
    normed = layer_norm(x, norm_weight, norm_bias, eps).to(attention.dtype)
    return x, normed, *(or_empty(tensor, attention) for tensor in saved)


def backward(
    grad_x: Tensor,
    grad_normed: Tensor,
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
    x: Tensor,
    projected: Tensor,
    hidden: Tensor,
    eps: float,
    needs: list[bool],
) -> list[Tensor]:
    """One gradient for each of the forward's tensors."""
    adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
    total, *on_norm = norm_and_sum_backward(
        grad_x, grad_normed, x, norm_weight, norm_bias, eps, needs[8:]
    )
    needs_linear = (needs[0], *needs[2:4])
    grad = rows(total.to(attention.dtype))
    on_adapter = [grad.new_empty(0)] * 4
    if adapter_fc1_weight is not None and adapter_fc2_weight is not None:
        needs_adapter = (any(needs_linear), *needs[4:8])
        on_projected, *on_adapter = perceptron_backward(
            grad,
            rows(projected),
            rows(hidden),
            adapter_fc1_weight,
            adapter_fc2_weight,
            needs_adapter,
        )
        grad = grad + on_projected if any(needs_linear) else grad
    on_attention, *on_linear = linear_backward(grad, rows(attention), weight, needs_linear)
    gradients = (on_attention, total, *on_linear, *on_adapter, *on_norm)
    tensors = (attention, residual, weight, bias, *adapter, norm_weight, norm_bias)
    return shaped(gradients, tensors, needs)
