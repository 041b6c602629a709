"""`adapter_mlp` in plain PyTorch: sums in place, an explicit backward that skips frozen parameters."""

from collections.abc import Sequence

from torch import Tensor

from refsam_kernels.adapter_mlp.inputs import Inputs, Outputs
from refsam_kernels.core.registration import or_empty
from refsam_kernels.feed_forward.mlp import empty_kept, mlp_backward, mlp_forward, scaled
from refsam_kernels.feed_forward.torch_steps import TORCH_STEPS, Steps, Sum, SumBackward, rows


def forward(inputs: Inputs, steps: Steps = TORCH_STEPS) -> Outputs:
    """x and its layer norm; for the backward, the norm's statistics and the values that each MLP keeps."""
    normed, keep = inputs.normed, inputs.keep
    adapted = None
    adapter_kept: Sequence[Tensor] = empty_kept(normed, None, keep)
    result, *kept = mlp_forward(steps, normed, inputs.mlp, keep=keep)
    if inputs.adapter is not None:
        adapted, *adapter_kept = mlp_forward(steps, normed, inputs.adapter, keep=keep)
    terms = (inputs.residual, result, adapted, inputs.scale)
    norm = (inputs.norm_weight, inputs.norm_bias, inputs.eps, keep)
    x, normed_next, *statistics = steps.add_and_norm(Sum(*terms, *norm))
    return Outputs(x, or_empty(normed_next, normed), *statistics, *kept, *adapter_kept)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grads: Sequence[Tensor],
    needs: Sequence[bool],
    steps: Steps = TORCH_STEPS,
) -> tuple[Tensor | None, ...]:
    """One gradient for each tensor of the inputs."""
    normed, scale = inputs.normed, inputs.scale
    (grad_x, grad_next), norm = grads, (inputs.norm_weight, inputs.norm_bias)
    summed = (grad_x, grad_next, outputs.x, outputs.mean, outputs.rstd, *norm)
    needs_sum = needs[5] or needs[9]
    total, grad, column_sum, *grad_norm = steps.add_and_norm_backward(
        SumBackward(*summed, normed.dtype, needs_sum, needs[10:])
    )
    tokens = rows(normed)
    kept = (outputs.hidden, outputs.activated)
    grad_normed, *grad_mlp = mlp_backward(
        steps, grad, tokens, kept, inputs.mlp, (needs[0], *needs[2:5])
    )
    grad_adapter: list[Tensor | None] = [None] * 4
    if inputs.adapter is not None:
        kept = (outputs.adapter_hidden, outputs.adapter_activated)
        adapter_needs = (needs[0], *needs[6:9])
        arguments = (grad, tokens, kept, inputs.adapter, adapter_needs)
        grad_normed, *grad_adapter = mlp_backward(
            steps, *arguments, scale=scale, addend=grad_normed
        )
        grad_adapter += [None if column_sum is None else scaled(column_sum, scale)]
    return (grad_normed, total, *grad_mlp, column_sum, *grad_adapter, *grad_norm)
