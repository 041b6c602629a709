"""Registration and public function of `adapter_projection`."""

from math import prod
from typing import Any

from torch import Tensor

from refsam_kernels.adapter_projection.inputs import Inputs, Outputs
from refsam_kernels.core.checks import autocast, check_shape
from refsam_kernels.core.flops import Product, counts, linear
from refsam_kernels.core.registration import Operator, needs_gradient
from refsam_kernels.feed_forward.mlp import (
    NO_ADAPTER,
    AdapterWeights,
    check_operands,
    check_tokens,
    empty_kept,
)
from refsam_kernels.feed_forward.torch_steps import empty_statistics, sum_dtype

operator = Operator("adapter_projection", Inputs, Outputs)


@operator.forward
def _forward(inputs: Inputs) -> Outputs:
    attention, residual, keep = inputs.attention, inputs.residual, inputs.keep
    x = residual.new_empty(residual.shape, dtype=sum_dtype(residual, attention))
    has_projected = keep and inputs.adapter_fc1_weight is not None
    projected = attention.new_empty(attention.shape if has_projected else 0)
    kept = empty_kept(attention, inputs.adapter_fc1_weight, keep)
    normed = attention.new_empty(attention.shape)
    return Outputs(x, normed, *empty_statistics(x, keep), projected, *kept)


operator.differentiate(
    {"grad_x": "x", "grad_normed": "normed"},
    saved=["x", "mean", "rstd", "projected", "hidden", "activated"],
)


@counts(operator)
def _products(inputs: Any) -> list[Product]:
    weights = ("weight", "adapter_fc1_weight", "adapter_fc2_weight")
    return linear(prod(inputs.attention[:-1]), inputs, *weights)


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
        backend: name of the backend; None lets the library choose.

    Returns:
        x (..., D) in the wider of residual's and attention's dtypes, and normed (..., D) in
        attention's. Under autocast attention and all weights but the norm's are cast to its dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the requested backend cannot run.

    Follows the RefSAM paper, section 3.2, and segment-anything `modeling/image_encoder.py`,
    `Block`.
    """
    attention, *weights = autocast(attention, weight, bias, *(adapter or NO_ADAPTER))
    tensors: list[Any] = [attention, residual, *weights, norm_weight, norm_bias]
    inputs = Inputs(*tensors, eps, needs_gradient(*tensors))  # type: ignore[call-arg]
    _check(inputs)
    return _forward(*inputs, backend or "")[:2]


def _check(inputs: Inputs) -> None:
    """Raises `ValueError` for arguments that `adapter_projection` cannot take."""
    width = check_tokens("attention", inputs.attention, inputs.residual)
    check_shape("weight", inputs.weight, (width, width))
    check_shape("bias", inputs.bias, (width,))
    weights = {"weight": inputs.weight, "bias": inputs.bias}
    norm = (inputs.norm_weight, inputs.norm_bias)
    tokens = {"attention": inputs.attention}
    check_operands(tokens, inputs.residual, weights, inputs.adapter, norm)
