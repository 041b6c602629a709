"""Registration and public function of `adapter_projection`."""

from typing import Any

from torch import Tensor

from refsam_kernels.core.checks import (
    autocast,
    check_same_device,
    check_same_dtype,
    check_shape,
    require,
)
from refsam_kernels.core.registration import (
    Operator,
    drop_skipped,
    empty_gradients,
    needs_gradient,
    or_zeros,
)
from refsam_kernels.feed_forward.mlp import (
    NO_ADAPTER,
    AdapterWeights,
    check_norm,
    check_perceptron,
    empty_kept,
    named_adapter,
)
from refsam_kernels.feed_forward.torch_steps import empty_statistics, sum_dtype

operator = Operator("adapter_projection")


@operator.forward
def _forward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x and its layer norm; for the backward, the norm's statistics, and with an adapter the projection and what it keeps.

    What is not kept has no elements.
    """
    x = residual.new_empty(residual.shape, dtype=sum_dtype(residual, attention))
    normed = attention.new_empty(attention.shape)
    has_projected = keep and adapter_fc1_weight is not None
    projected = attention.new_empty(attention.shape if has_projected else 0)
    kept = empty_kept(attention, adapter_fc1_weight, keep)
    return x, normed, *empty_statistics(x, keep), projected, *kept


@operator.backward
def _backward(
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
    backend: str,
) -> list[Tensor]:
    """One gradient for each tensor from `attention` to `norm_bias`."""
    adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
    tensors = (attention, residual, weight, bias, *adapter, norm_weight, norm_bias)
    return list(empty_gradients(tensors, needs))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, _, _ = inputs
    x, _, *saved = output
    ctx.save_for_backward(*tensors, x, *saved)
    ctx.mark_non_differentiable(*saved)


def _gradients(
    ctx: Any, grad_x: Tensor | None, grad_normed: Tensor | None, *_: None
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    attention, x = saved[0], saved[10]
    grads = (or_zeros(grad_x, x), or_zeros(grad_normed, attention))
    needs = list(ctx.needs_input_grad[:10])
    gradients = _backward(*grads, *saved, ctx.eps, needs, ctx.backend)
    return *drop_skipped(gradients, needs), None, None, None


operator.differentiate(_save, _gradients)


def adapter_projection(
    attention: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    adapter: AdapterWeights | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention's output projection, the space adapter, the residual and the next layer norm.

    `y = attention @ weight.T + bias`, `x = residual + (y + adapter(y))`, `normed = layer_norm(x)`.
    An adapter whose second layer is zero changes nothing, not even a bit.

    Args:
        attention: (..., D) floating point.
        residual: (..., D) floating point, the residual stream.
        weight, bias: (D, D) and (D,), attention's dtype.
        adapter: its parameters in attention's dtype, or None; its GELU is the exact one.
        norm_weight, norm_bias: (D,), x's dtype or float32.
        eps: added to the variance.
        backend: a backend by name; None leaves the choice to the library.

    Returns:
        x (..., D) in the wider of residual's and attention's dtypes, and normed (..., D) in
        attention's. Under autocast attention and all weights but the norm's are cast to its dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the backend that was asked for cannot run.

    Follows the RefSAM paper, section 3.2, and segment-anything `modeling/image_encoder.py`,
    `Block`.
    """
    attention, weight, bias, *adapter_tensors = autocast(
        attention, weight, bias, *(adapter or NO_ADAPTER)
    )
    if adapter is not None:
        adapter = AdapterWeights(*adapter_tensors)
    _check(attention, residual, weight, bias, adapter, norm_weight, norm_bias)
    tensors = (attention, residual, weight, bias, *adapter_tensors, norm_weight, norm_bias)
    return _forward(*tensors, eps, needs_gradient(*tensors), backend or "")[:2]


def _check(
    attention: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    adapter: AdapterWeights | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> None:
    """Raises `ValueError` for what `adapter_projection` cannot take."""
    require(attention.dim() > 1, "attention", f"shape {tuple(attention.shape)}", "(..., D)")
    width = attention.shape[-1]
    check_shape("residual", residual, tuple(attention.shape))
    check_shape("weight", weight, (width, width))
    check_shape("bias", bias, (width,))
    operands = {"weight": weight, "bias": bias}
    if adapter is not None:
        adapter_operands = named_adapter(adapter)
        check_perceptron(adapter_operands, width)
        operands |= adapter_operands
    check_same_dtype(attention=attention, **operands)
    check_norm(norm_weight, norm_bias, sum_dtype(residual, attention), width)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_same_device(attention=attention, residual=residual, **operands, **norm)
