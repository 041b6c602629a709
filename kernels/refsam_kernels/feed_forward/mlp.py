"""Two-layer perceptrons `fc2(gelu(fc1(x)))` and their backward, for `adapter_mlp` and `adapter_projection`.

The backward is explicit, on rows (·, D) of tokens: it skips what is not needed, and computes the GELU again instead of keeping
its result where that is large. The matrix products are torch's in every backend; a backend's `Steps` compute the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.checks import check_shape, require
from refsam_kernels.feed_forward.torch_steps import Steps, rows, short


class AdapterWeights(NamedTuple):
    """Parameters of an adapter `fc2(gelu(fc1(x)))` of H hidden channels: (H, D), (H,), (D, H), (D,)."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


NO_ADAPTER = (None, None, None, None)
# Elements of a GELU's result that is kept for the backward: computing it again takes time, and saves much memory only
# where it is large.
MOST_KEPT = 2**22
# What the kernels on rows, in Triton and in CUDA, have in their registers.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_ROW = 8192


def check_perceptron(weights: Mapping[str, Tensor], width: int) -> None:
    """Raises `ValueError` unless four tensors, by their names in messages, fit tokens of this width.

    Their order is that of `AdapterWeights`.
    """
    (first, fc1_weight), *others = weights.items()
    check_shape(first, fc1_weight, ("H", width))
    hidden = fc1_weight.shape[0]
    wanted = ((hidden,), (width, hidden), (width,))
    for (name, tensor), shape in zip(others, wanted, strict=True):
        check_shape(name, tensor, shape)


def named_adapter(adapter: AdapterWeights) -> dict[str, Tensor]:
    """The adapter's tensors by their names in messages."""
    return {f"adapter.{name}": tensor for name, tensor in adapter._asdict().items()}


def check_norm(weight: Tensor, bias: Tensor, x_dtype: torch.dtype, width: int) -> None:
    """Raises `ValueError` unless a layer norm's parameters fit x: its width, and its dtype or float32."""
    for name, tensor in (("norm_weight", weight), ("norm_bias", bias)):
        check_shape(name, tensor, (width,))
        fits = tensor.dtype in (x_dtype, torch.float32)
        require(fits, name, tensor.dtype, f"{x_dtype} as the sum has, or torch.float32")


def empty_kept(x: Tensor, fc1_weight: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """Memory for what `perceptron` keeps."""
    if not keep or fc1_weight is None:
        return x.new_empty(0), x.new_empty(0)
    hidden = x.new_empty(*x.shape[:-1], fc1_weight.shape[0])
    return hidden, x.new_empty(hidden.shape if hidden.numel() <= MOST_KEPT else 0)


def kept_of(hidden: Tensor, activated: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """What `perceptron` keeps of its values before and after the GELU."""
    keep_activated = keep and hidden.numel() <= MOST_KEPT
    return (
        hidden if keep else hidden.new_empty(0),  # an operator's outputs must not be one tensor
        activated if keep_activated else hidden.new_empty(0),
    )


def perceptron(
    steps: Steps, x: Tensor, weights: Sequence[Any], *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fc2(gelu(fc1(x)))`, and what the backward needs: the values (..., H) before and, where they are few, after the GELU.

    What is not kept has no elements.
    """
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    hidden, activated = steps.hidden_layer(x, fc1_weight, fc1_bias, keep)
    return F.linear(activated, fc2_weight, fc2_bias), *kept_of(hidden, activated, keep)


def perceptron_backward(
    steps: Steps,
    grad: Tensor,
    x: Tensor,
    kept: tuple[Tensor, Tensor],
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    needs: Sequence[bool],
    *,
    scale: float = 1.0,
    addend: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of `scale * perceptron(x)` for the gradient (rows, D) of its result, None where `needs` is False.

    In the order x, fc1_weight, fc1_bias, fc2_weight; fc2_bias has the column sum of `scale * grad`. To the gradient of x
    `addend` is added. `kept` is what `perceptron` keeps.
    """
    on_x = on_fc1_weight = on_fc1_bias = on_fc2_weight = None
    hidden, activated = map(rows, kept) if kept[1].numel() else (rows(kept[0]), None)
    if any(needs[:3]):
        on_hidden = grad @ scaled(fc2_weight, scale)
        again = needs[3] and activated is None
        recomputed, on_fc1_bias = steps.gelu_backward(on_hidden, hidden, again, needs[2])
        activated = recomputed if again else activated
        on_fc1_weight = on_hidden.T @ x if needs[1] else None
    if needs[0]:
        product = (on_hidden, fc1_weight)
        on_x = torch.mm(*product) if addend is None else torch.addmm(addend, *product)
    if needs[3]:
        activated = F.gelu(hidden) if activated is None else activated
        on_fc2_weight = scaled(grad.T @ activated, scale)
    return [on_x, on_fc1_weight, on_fc1_bias, on_fc2_weight]


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """scale * tensor."""
    return tensor if scale == 1 else tensor * scale


def shaped(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients in the tensors' shapes and dtypes, without elements where `needs` is False."""
    like = next(tensor for tensor in tensors if tensor is not None)
    return [
        gradient.view(tensor.shape).to(tensor.dtype)
        if need and gradient is not None and tensor is not None
        else like.new_empty(0)
        for gradient, tensor, need in zip(gradients, tensors, needs, strict=True)
    ]


def reasons_against(tokens: Tensor, residual: Tensor) -> list[str]:
    """Why the kernels on rows cannot compute these: their dtype, or rows too wide for the registers."""
    reasons = [
        f"computes {', '.join(map(short, KERNEL_DTYPES))}, got {short(dtype)}"
        for dtype in sorted({tokens.dtype, residual.dtype} - set(KERNEL_DTYPES), key=str)
    ]
    if tokens.shape[-1] > WIDEST_ROW:
        reasons.append(f"takes rows of at most {WIDEST_ROW} channels, got {tokens.shape[-1]}")
    return reasons
