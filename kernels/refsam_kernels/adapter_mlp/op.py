"""Registration and public function of `adapter_mlp`."""

from math import prod
from typing import Any

from torch import Tensor

from refsam_kernels.adapter_mlp.inputs import Inputs, Outputs
from refsam_kernels.core.checks import autocast, require
from refsam_kernels.core.flops import Product, counts, linear
from refsam_kernels.core.registration import Operator, needs_gradient
from refsam_kernels.feed_forward.mlp import (
    NO_ADAPTER,
    AdapterWeights,
    check_mlp,
    check_operands,
    check_tokens,
    empty_kept,
)
from refsam_kernels.feed_forward.torch_steps import empty_statistics, sum_dtype

operator = Operator("adapter_mlp", Inputs, Outputs)


@operator.forward
def _forward(inputs: Inputs) -> Outputs:
    normed, residual = inputs.normed, inputs.residual
    has_norm = inputs.norm_weight is not None
    x = residual.new_empty(residual.shape, dtype=sum_dtype(residual, normed))
    kept = empty_kept(normed, inputs.fc1_weight, inputs.keep)
    adapter_kept = empty_kept(normed, inputs.adapter_fc1_weight, inputs.keep)
    normed = normed.new_empty(normed.shape if has_norm else 0)
    return Outputs(x, normed, *empty_statistics(x, inputs.keep and has_norm), *kept, *adapter_kept)


operator.differentiate(
    {"grad_x": "x", "grad_normed": "normed"},
    saved=["x", "mean", "rstd", "hidden", "activated", "adapter_hidden", "adapter_activated"],
)


@counts(operator)
def _products(inputs: Any) -> list[Product]:
    weights = ("fc1_weight", "fc2_weight", "adapter_fc1_weight", "adapter_fc2_weight")
    return linear(prod(inputs.normed[:-1]), inputs, *weights)


def adapter_mlp(
    normed: Tensor,
    residual: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    adapter: AdapterWeights | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    scale: float = 0.5,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A transformer's MLP with a parallel adapter, the residual and the next block's layer norm.

    `x = residual + mlp(normed) + scale * adapter(normed)`, `normed_next = layer_norm(x)`. An adapter
    whose second layer is zero changes nothing, not even a bit.

    Args:
        normed: (..., D) floating point, the MLP's input.
        residual: (..., D) floating point, the residual stream.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: (H, D), (H,), (D, H), (D,), normed's dtype; the
            GELU between the layers is the exact one.
        adapter: its parameters in normed's dtype, or None.
        norm_weight, norm_bias: (D,), x's dtype or float32; None where no layer norm follows.
        scale: factor of the adapter.
        eps: added to the variance.
        backend: name of the backend; None lets the library choose.

    Returns:
        x (..., D) in the wider of residual's and normed's dtypes, and normed_next (..., D) in
        normed's, or None. Under autocast normed and all weights but the norm's are cast to its
        dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the requested backend cannot run.

    Follows the RefSAM paper, section 3.2, and segment-anything `modeling/image_encoder.py`,
    `Block`.
    """
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    normed, *weights = autocast(normed, *mlp, *(adapter or NO_ADAPTER))
    tensors: list[Any] = [normed, residual, *weights, norm_weight, norm_bias]
    inputs = Inputs(*tensors, scale, eps, needs_gradient(*tensors))  # type: ignore[call-arg]
    _check(inputs)
    x, normed_next, *_ = _forward(*inputs, backend or "")
    return x, normed_next if norm_weight is not None else None


def _check(inputs: Inputs) -> None:
    """Raises `ValueError` for arguments that `adapter_mlp` cannot take."""
    norm, mlp = (inputs.norm_weight, inputs.norm_bias), inputs.mlp._asdict()
    check_mlp(mlp, check_tokens("normed", inputs.normed, inputs.residual))
    check_operands({"normed": inputs.normed}, inputs.residual, mlp, inputs.adapter, norm)
    is_whole = (inputs.norm_weight is None) == (inputs.norm_bias is None)
    wanted = "both norm_weight and norm_bias or none"
    require(is_whole, "norm_bias", "one without the other", wanted)
