"""`adapter_mlp` in plain PyTorch: sums in place, an explicit backward that skips what is frozen."""

from collections.abc import Sequence

from torch import Tensor

from refsam_kernels.core.registration import or_empty
from refsam_kernels.feed_forward.mlp import (
    empty_kept,
    perceptron,
    perceptron_backward,
    scaled,
    shaped,
)
from refsam_kernels.feed_forward.torch_steps import TORCH_STEPS, Steps, rows


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
    steps: Steps = TORCH_STEPS,
) -> tuple[Tensor, ...]:
    """x and its layer norm; for the backward, the norm's statistics and what each perceptron keeps."""
    adapted = None
    kept_by_adapter: Sequence[Tensor] = empty_kept(normed, None, keep)
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    result, *kept = perceptron(steps, normed, mlp, keep=keep)
    if adapter_fc1_weight is not None:
        adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
        adapted, *kept_by_adapter = perceptron(steps, normed, adapter, keep=keep)
    norm = (norm_weight, norm_bias)
    x, normed_next, *statistics = steps.add_and_norm(
        residual, result, adapted, scale, *norm, eps, keep
    )
    return x, or_empty(normed_next, normed), *statistics, *kept, *kept_by_adapter


def backward(
    grad_x: Tensor,
    grad_normed: Tensor,
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
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    activated: Tensor,
    adapter_hidden: Tensor,
    adapter_activated: Tensor,
    scale: float,
    eps: float,
    needs: list[bool],
    steps: Steps = TORCH_STEPS,
) -> list[Tensor]:
    """One gradient for each of the forward's tensors."""
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
    norm = (norm_weight, norm_bias)
    needs_sum = needs[5] or needs[9]
    total, grad, column_sum, *on_norm = steps.add_and_norm_backward(
        grad_x, grad_normed, x, mean, rstd, *norm, normed.dtype, needs_sum, needs[10:]
    )
    tokens = rows(normed)
    kept = (hidden, activated)
    on_normed, *on_mlp = perceptron_backward(
        steps, grad, tokens, kept, fc1_weight, fc2_weight, (needs[0], *needs[2:5])
    )
    on_adapter: list[Tensor | None] = [None] * 3
    on_adapter_bias = None
    if adapter_fc1_weight is not None and adapter_fc2_weight is not None:
        kept = (adapter_hidden, adapter_activated)
        on_normed, *on_adapter = perceptron_backward(
            *(steps, grad, tokens, kept, adapter_fc1_weight, adapter_fc2_weight),
            (needs[0], *needs[6:9]),
            scale=scale,
            addend=on_normed,
        )
        on_adapter_bias = scaled(column_sum, scale) if column_sum is not None else None
    gradients = (on_normed, total, *on_mlp, column_sum, *on_adapter, on_adapter_bias, *on_norm)
    return shaped(gradients, (normed, residual, *mlp, *adapter, *norm), needs)
