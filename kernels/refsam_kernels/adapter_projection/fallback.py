"""`adapter_projection` in plain PyTorch: sums in place, an explicit backward that skips frozen parameters."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.adapter_projection.inputs import Inputs, Outputs
from refsam_kernels.core.registration import or_empty
from refsam_kernels.feed_forward.mlp import empty_kept, mlp_backward, mlp_forward
from refsam_kernels.feed_forward.torch_steps import TORCH_STEPS, Steps, Sum, SumBackward, rows


def forward(inputs: Inputs, steps: Steps = TORCH_STEPS) -> Outputs:
    """x and its layer norm; for the backward, the norm's statistics, and with an adapter the projection and its values."""
    attention, keep = inputs.attention, inputs.keep
    terms: tuple[Tensor, Tensor | None]
    projected = F.linear(attention, inputs.weight, inputs.bias)
    saved: tuple[Tensor, ...] = (attention.new_empty(0), *empty_kept(projected, None, keep))
    if inputs.adapter is None:
        terms = (projected, None)
    else:
        adapted, *kept = mlp_forward(steps, projected, inputs.adapter, keep=keep)
        terms = (adapted, projected)  # in this order, since the first may be overwritten
        saved = (projected, *kept) if keep else saved
    first, second = terms
    norm = (inputs.norm_weight, inputs.norm_bias, inputs.eps, keep)
    x, normed, *statistics = steps.add_and_norm(Sum(inputs.residual, first, second, 1.0, *norm))
    return Outputs(x, or_empty(normed, attention), *statistics, *saved)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grads: Sequence[Tensor],
    needs: Sequence[bool],
    steps: Steps = TORCH_STEPS,
) -> tuple[Tensor | None, ...]:
    """One gradient for each tensor of the inputs."""
    attention, adapter = inputs.attention, inputs.adapter
    (grad_x, grad_normed), norm = grads, (inputs.norm_weight, inputs.norm_bias)
    summed = (grad_x, grad_normed, outputs.x, outputs.mean, outputs.rstd, *norm)
    needs_sum = needs[3] if adapter is None else needs[7]
    total, grad, column_sum, *grad_norm = steps.add_and_norm_backward(
        SumBackward(*summed, attention.dtype, needs_sum, needs[8:])
    )
    grad_adapter: list[Tensor | None] = [None] * 4
    grad_bias = column_sum
    if adapter is not None:
        kept = (outputs.hidden, outputs.activated)
        adapter_needs = (any((needs[0], *needs[2:4])), *needs[4:7])
        grad_projected, *grad_weights = mlp_backward(
            steps, grad, rows(outputs.projected), kept, adapter, adapter_needs, addend=grad
        )
        grad_adapter = [*grad_weights, column_sum]
        if grad_projected is not None:
            grad = grad_projected
            grad_bias = grad.sum(0) if needs[3] else None
    grad_attention = grad @ inputs.weight if needs[0] else None
    grad_weight = grad.T @ rows(attention) if needs[2] else None
    return (grad_attention, total, grad_weight, grad_bias, *grad_adapter, *grad_norm)
