"""`adapter_projection` in plain PyTorch: sums in place, an explicit backward that skips what is frozen."""

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.registration import or_empty
from refsam_kernels.feed_forward.mlp import (
    empty_kept,
    perceptron,
    perceptron_backward,
    shaped,
)
from refsam_kernels.feed_forward.torch_steps import TORCH_STEPS, Steps, rows


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
    steps: Steps = TORCH_STEPS,
) -> tuple[Tensor, ...]:
    """x and its layer norm; for the backward, the norm's statistics, and with an adapter the projection and what it keeps."""
    terms: tuple[Tensor, Tensor | None]
    projected = F.linear(attention, weight, bias)
    saved: tuple[Tensor, ...] = (attention.new_empty(0), *empty_kept(projected, None, keep))
    if adapter_fc1_weight is None:
        terms = (projected, None)
    else:
        adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
        adapted, *kept = perceptron(steps, projected, adapter, keep=keep)
        terms = (adapted, projected)  # in this order, since the first may be overwritten
        saved = (projected, *kept) if keep else saved
    x, normed, *statistics = steps.add_and_norm(
        residual, *terms, 1.0, norm_weight, norm_bias, eps, keep
    )
    return x, or_empty(normed, attention), *statistics, *saved


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
    mean: Tensor,
    rstd: Tensor,
    projected: Tensor,
    hidden: Tensor,
    activated: Tensor,
    eps: float,
    needs: list[bool],
    steps: Steps = TORCH_STEPS,
) -> list[Tensor]:
    """One gradient for each of the forward's tensors."""
    adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
    norm = (norm_weight, norm_bias)
    has_adapter = adapter_fc1_weight is not None
    needs_linear = any((needs[0], *needs[2:4]))
    needs_sum = needs[7] if has_adapter else needs[3]
    total, grad, column_sum, *on_norm = steps.add_and_norm_backward(
        grad_x, grad_normed, x, mean, rstd, *norm, attention.dtype, needs_sum, needs[8:]
    )
    on_adapter: list[Tensor | None] = [None] * 4
    on_bias = column_sum
    if adapter_fc1_weight is not None and adapter_fc2_weight is not None:
        on_projected, *on_weights = perceptron_backward(
            *(steps, grad, rows(projected), (hidden, activated)),
            *(adapter_fc1_weight, adapter_fc2_weight, (needs_linear, *needs[4:7])),
            addend=grad,
        )
        on_adapter = [*on_weights, column_sum]
        if on_projected is not None:
            grad = on_projected
            on_bias = grad.sum(0) if needs[3] else None
    on_attention = grad @ weight if needs[0] else None
    on_weight = grad.T @ rows(attention) if needs[2] else None
    gradients = (on_attention, total, on_weight, on_bias, *on_adapter, *on_norm)
    return shaped(gradients, (attention, residual, weight, bias, *adapter, *norm), needs)
