"""Registration and public function of `adapter_mlp`."""

from collections.abc import Sequence
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

operator = Operator("adapter_mlp")


@operator.forward
def _forward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x and its layer norm; for the backward, the norm's statistics and what each perceptron keeps.

    What is not asked for (no norm, no `keep`, no adapter) has no elements.
    """
    x = residual.new_empty(residual.shape, dtype=sum_dtype(residual, normed))
    normed_next = normed.new_empty(normed.shape if norm_weight is not None else 0)
    statistics = empty_statistics(x, keep and norm_weight is not None)
    kept = empty_kept(normed, fc1_weight, keep)
    return x, normed_next, *statistics, *kept, *empty_kept(normed, adapter_fc1_weight, keep)


@operator.backward
def _backward(
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
    backend: str,
) -> list[Tensor]:
    """One gradient for each tensor from `normed` to `norm_bias`."""
    adapter = (adapter_fc1_weight, adapter_fc1_bias, adapter_fc2_weight, adapter_fc2_bias)
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    tensors = (normed, residual, *mlp, *adapter, norm_weight, norm_bias)
    return list(empty_gradients(tensors, needs))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.eps, _, _ = inputs
    x, _, *saved = output
    ctx.save_for_backward(*tensors, x, *saved)
    ctx.mark_non_differentiable(*saved)


def _gradients(
    ctx: Any, grad_x: Tensor | None, grad_normed: Tensor | None, *_: None
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    normed, norm_weight, x = saved[0], saved[10], saved[12]
    normed_next = normed if norm_weight is not None else normed.new_empty(0)
    grads = (or_zeros(grad_x, x), or_zeros(grad_normed, normed_next))
    needs = list(ctx.needs_input_grad[:12])
    gradients = _backward(*grads, *saved, ctx.scale, ctx.eps, needs, ctx.backend)
    return *drop_skipped(gradients, needs), None, None, None, None


operator.differentiate(_save, _gradients)


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
        normed: (..., D) floating point, what the MLP reads.
        residual: (..., D) floating point, the residual stream.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: (H, D), (H,), (D, H), (D,), normed's dtype; the
            GELU between the layers is the exact one.
        adapter: its parameters in normed's dtype, or None.
        norm_weight, norm_bias: (D,), x's dtype or float32; None where no layer norm follows.
        scale: factor of the adapter.
        eps: added to the variance.
        backend: a backend by name; None leaves the choice to the library.

    Returns:
        x (..., D) in the wider of residual's and normed's dtypes, and normed_next (..., D) in
        normed's, or None. Under autocast normed and all weights but the norm's are cast to its
        dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the backend that was asked for cannot run.

    Follows the RefSAM paper, section 3.2, and segment-anything `modeling/image_encoder.py`,
    `Block`.
    """
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    normed, *weights = autocast(normed, *mlp, *(adapter or NO_ADAPTER))
    if adapter is not None:
        adapter = AdapterWeights(*weights[4:])
    _check(normed, residual, weights[:4], adapter, norm_weight, norm_bias)
    tensors = (normed, residual, *weights, norm_weight, norm_bias)
    keep = needs_gradient(*tensors)
    x, normed_next, *_ = _forward(*tensors, scale, eps, keep, backend or "")
    return x, normed_next if norm_weight is not None else None


def _check(
    normed: Tensor,
    residual: Tensor,
    mlp: Sequence[Tensor],
    adapter: AdapterWeights | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    """Raises `ValueError` for what `adapter_mlp` cannot take."""
    require(normed.dim() > 1, "normed", f"shape {tuple(normed.shape)}", "(..., D)")
    width = normed.shape[-1]
    check_shape("residual", residual, tuple(normed.shape))
    operands = dict(zip(AdapterWeights._fields, mlp, strict=True))
    check_perceptron(operands, width)
    if adapter is not None:
        check_perceptron(named_adapter(adapter), width)
        operands |= named_adapter(adapter)
    check_same_dtype(normed=normed, **operands)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_same_device(normed=normed, residual=residual, **operands, **norm)
    if norm_weight is not None and norm_bias is not None:
        check_norm(norm_weight, norm_bias, sum_dtype(residual, normed), width)
    together = (norm_weight is None) == (norm_bias is None)
    require(
        together, "norm_bias", "one without the other", "both norm_weight and norm_bias or none"
    )
