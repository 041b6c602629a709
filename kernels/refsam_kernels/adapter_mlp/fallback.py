"""`adapter_mlp` in plain PyTorch: sums in place, an explicit backward that skips what is frozen."""

from torch import Tensor

from refsam_kernels.feed_forward import (
    layer_norm,
    norm_and_sum_backward,
    perceptron,
    perceptron_backward,
    rows,
    shaped,
)
from refsam_kernels.registration import or_empty


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
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    result, hidden = perceptron(normed, mlp, keep=keep)
    x = (residual + result).contiguous()
    if adapter_fc1_weight is not None:
        adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
        adapted, adapter_hidden = perceptron(normed, adapter, keep=keep)
        x.add_(adapted, alpha=scale)
    if norm_weight is not None and norm_bias is not None:
        normed_next = layer_norm(x, norm_weight, norm_bias, eps).to(normed.dtype)
    return x, *(or_empty(tensor, normed) for tensor in (normed_next, hidden, adapter_hidden))


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
    hidden: Tensor,
    adapter_hidden: Tensor,
    scale: float,
    eps: float,
    needs: list[bool],
) -> list[Tensor]:
    """One gradient for each of the forward's tensors."""
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
    total, *on_norm = norm_and_sum_backward(
        grad_x, grad_normed, x, norm_weight, norm_bias, eps, needs[10:]
    )
    grad = rows(total.to(normed.dtype))
    on_normed, *on_mlp = perceptron_backward(
        grad, rows(normed), rows(hidden), fc1_weight, fc2_weight, (needs[0], *needs[2:6])
    )
    on_adapter = [grad.new_empty(0)] * 4
    if adapter_fc1_weight is not None and adapter_fc2_weight is not None:
        on_branch, *on_adapter = perceptron_backward(
            grad * scale,
            rows(normed),
            rows(adapter_hidden),
            adapter_fc1_weight,
            adapter_fc2_weight,
            (needs[0], *needs[6:10]),
        )
        on_normed.add_(on_branch)
    gradients = (on_normed, total, *on_mlp, *on_adapter, *on_norm)
    return shaped(gradients, (normed, residual, *mlp, *adapter, norm_weight, norm_bias), needs)
