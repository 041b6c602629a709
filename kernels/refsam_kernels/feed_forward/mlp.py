"""MLPs `fc2(gelu(fc1(x)))` of two layers and their backward, for `adapter_mlp` and `adapter_projection`.

The backward is explicit, on rows (·, D) of tokens: it skips frozen parameters, and recomputes a large GELU instead of keeping
its result. Every backend takes torch's matrix products; its `Steps` compute the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.checks import (
    check_same_device,
    check_same_dtype,
    check_shape,
    require,
)
from refsam_kernels.core.reasons import KERNEL_DTYPES, dtype_reasons, limit_reasons
from refsam_kernels.feed_forward.torch_steps import Steps, rows, sum_dtype


class MLPWeights(NamedTuple):
    """Parameters of `fc2(gelu(fc1(x)))` with H hidden channels: (H, D), (H,), (D, H), (D,)."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


AdapterWeights = MLPWeights  # an adapter is an MLP
NO_ADAPTER = (None, None, None, None)
# Largest GELU result that is kept for the backward, in elements: recomputing takes time, and saves much memory only
# where the result is large.
MOST_KEPT = 2**22
WIDEST_ROW = 8192  # of the kernels in Triton and CUDA, which hold a row in registers


def check_mlp(weights: Mapping[str, Tensor], width: int) -> None:
    """Raises `ValueError` unless four tensors, by their names in messages, fit tokens of this width.

    Their order is that of `MLPWeights`.
    """
    (first, fc1_weight), *others = weights.items()
    check_shape(first, fc1_weight, ("H", width))
    hidden = fc1_weight.shape[0]
    wanted = ((hidden,), (width, hidden), (width,))
    for (name, tensor), shape in zip(others, wanted, strict=True):
        check_shape(name, tensor, shape)


def check_tokens(name: str, tokens: Tensor, residual: Tensor) -> int:
    """Raises `ValueError` unless tokens and residual have one shape (..., D); returns D."""
    require(tokens.dim() > 1, name, f"shape {tuple(tokens.shape)}", "(..., D)")
    check_shape("residual", residual, tuple(tokens.shape))
    return tokens.shape[-1]


def check_operands(
    tokens: Mapping[str, Tensor],
    residual: Tensor,
    weights: Mapping[str, Tensor],
    adapter: MLPWeights | None,
    norm: tuple[Tensor | None, Tensor | None],
) -> None:
    """Raises `ValueError` unless adapter, norm, dtypes and devices fit `tokens`, one tensor by its name."""
    (operand,) = tokens.values()
    width = operand.shape[-1]
    operands = {**tokens, **weights}
    if adapter is not None:
        named = {f"adapter.{name}": tensor for name, tensor in adapter._asdict().items()}
        check_mlp(named, width)
        operands |= named
    check_same_dtype(**operands)
    of_norm = dict(zip(("norm_weight", "norm_bias"), norm, strict=True))
    dtype = sum_dtype(residual, operand)
    for name, tensor in of_norm.items():
        if tensor is not None:
            check_shape(name, tensor, (width,))
            fits = tensor.dtype in (dtype, torch.float32)
            require(fits, name, tensor.dtype, f"{dtype} as the sum has, or torch.float32")
    check_same_device(**operands, residual=residual, **of_norm)


def empty_kept(x: Tensor, fc1_weight: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """Memory for the values that `mlp_forward` keeps."""
    if not keep or fc1_weight is None:
        return x.new_empty(0), x.new_empty(0)
    hidden = x.new_empty(*x.shape[:-1], fc1_weight.shape[0])
    return hidden, x.new_empty(hidden.shape if hidden.numel() <= MOST_KEPT else 0)


def kept_of(hidden: Tensor, activated: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The values before and after the GELU that `mlp_forward` keeps."""
    keep_activated = keep and hidden.numel() <= MOST_KEPT
    return (
        hidden if keep else hidden.new_empty(0),  # an operator's outputs must not be one tensor
        activated if keep_activated else hidden.new_empty(0),
    )


def mlp_forward(
    steps: Steps, x: Tensor, weights: MLPWeights, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fc2(gelu(fc1(x)))`, and for the backward the values (..., H) before and, where they are few, after the GELU.

    Values that are not kept have no elements.
    """
    hidden, activated = steps.hidden_layer(x, weights.fc1_weight, weights.fc1_bias, keep)
    return F.linear(activated, *weights[2:]), *kept_of(hidden, activated, keep)


def mlp_backward(
    steps: Steps,
    grad: Tensor,
    x: Tensor,
    kept: tuple[Tensor, Tensor],
    weights: MLPWeights,
    needs: Sequence[bool],
    *,
    scale: float = 1.0,
    addend: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of `scale * mlp_forward(x)` for the gradient (rows, D) of its result, None where `needs` is False.

    In the order x, fc1_weight, fc1_bias, fc2_weight; the gradient of fc2_bias is the column sum of `scale * grad`. `addend` is
    added to the gradient of x. `kept` holds the values that `mlp_forward` keeps.
    """
    grad_x = grad_fc1_weight = grad_fc1_bias = grad_fc2_weight = None
    hidden, activated = map(rows, kept) if kept[1].numel() else (rows(kept[0]), None)
    if any(needs[:3]):
        grad_hidden = grad @ scaled(weights.fc2_weight, scale)
        again = needs[3] and activated is None
        recomputed, grad_fc1_bias = steps.gelu_backward(grad_hidden, hidden, again, needs[2])
        activated = recomputed if again else activated
        grad_fc1_weight = grad_hidden.T @ x if needs[1] else None
    if needs[0]:
        product = (grad_hidden, weights.fc1_weight)
        grad_x = torch.mm(*product) if addend is None else torch.addmm(addend, *product)
    if needs[3]:
        activated = F.gelu(hidden) if activated is None else activated
        grad_fc2_weight = scaled(grad.T @ activated, scale)
    return [grad_x, grad_fc1_weight, grad_fc1_bias, grad_fc2_weight]


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """scale * tensor."""
    return tensor if scale == 1 else tensor * scale


def not_supported_reasons(inputs: Any) -> list[str]:
    """Why the kernels on rows cannot compute these: their dtype, or rows too wide for the registers."""
    tokens, residual, *_ = inputs
    limit = ("channels in a row", tokens.shape[-1], WIDEST_ROW)
    return dtype_reasons(KERNEL_DTYPES, tokens, residual) + limit_reasons(limit)
