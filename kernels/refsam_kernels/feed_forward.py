"""What `adapter_mlp` and `adapter_projection` share: adapters, two-layer perceptrons, sums with a layer norm.

The backwards are explicit, on rows (·, D) of tokens: they skip what is not needed, and compute the GELU again instead of keeping
its result where that is large. The matrix products are torch's in every backend; what lies between them is its `Steps`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.arguments import check_shape, require


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


def sum_dtype(residual: Tensor, operand: Tensor) -> torch.dtype:
    """The dtype of the residual stream after an operand was added: the wider one."""
    return torch.promote_types(residual.dtype, operand.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer norm over the last dimension, and torch's mean and inverse deviation (..., 1) of each row.

    x and the parameters may differ in dtype; all results have the wider one.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.native_layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation (..., 1) over the last dimension, at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return mean, (variance + eps).rsqrt()


def empty_statistics(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Memory for `row_statistics` of x; without elements where they are not kept."""
    shape = (*x.shape[:-1], 1) if keep else (0,)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


class Normed(NamedTuple):
    """A sum x, its layer norm or None, and `row_statistics`, without elements where they are not kept."""

    x: Tensor
    normed: Tensor | None
    mean: Tensor
    rstd: Tensor


class OnSum(NamedTuple):
    """Gradients of `add_and_norm`, None where not needed.

    Of the sum: `total` (rows, D) in x's dtype and `operand` (rows, D) in that of the products, maybe the same tensor, and
    `column_sum` (D,), the gradient of a bias within the sum. Of the layer norm: its parameters'.
    """

    total: Tensor
    operand: Tensor
    column_sum: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class Steps(NamedTuple):
    """What lies between the matrix products, each as the function of this module that has its name."""

    hidden_layer: Callable[..., tuple[Tensor, Tensor]]
    add_and_norm: Callable[..., Normed]
    add_and_norm_backward: Callable[..., OnSum]
    gelu_backward: Callable[..., tuple[Tensor | None, Tensor | None]]


def hidden_layer(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """`weight x + bias` (..., H) and its GELU, which overwrites it if it is not to be kept."""
    hidden = F.linear(x, weight, bias)
    return hidden, F.gelu(hidden) if keep else torch.ops.aten.gelu_(hidden)


def add_and_norm(
    residual: Tensor,
    first: Tensor,
    second: Tensor | None,
    scale: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep: bool,
) -> Normed:
    """`x = residual + first + scale * second` and its layer norm in first's dtype, (..., D) all.

    `first` may be overwritten. A `second` of zeros changes no bit. `keep` asks for the statistics.
    """
    # Converted before it is added: a sum of two dtypes takes a CPU several times as long.
    x = first.to(sum_dtype(residual, first)).contiguous().add_(residual)
    if second is not None:
        x.add_(second, alpha=scale)
    if norm_weight is None or norm_bias is None:
        return Normed(x, None, *empty_statistics(x, False))
    normed, mean, rstd = layer_norm(x, norm_weight, norm_bias, eps)
    normed = normed.to(first.dtype)
    if not keep:
        return Normed(x, normed, *empty_statistics(x, False))
    if mean.dtype.itemsize < 4:  # as on a CPU if all is bfloat16
        mean, rstd = row_statistics(x, eps)
    return Normed(x, normed, mean, rstd)


def add_and_norm_backward(
    grad_x: Tensor,
    grad_normed: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype,
    needs_column_sum: bool,
    needs_norm: Sequence[bool],
) -> OnSum:
    """Gradients of `add_and_norm`, in new memory; `dtype` is that of the products."""
    on_norm: Sequence[Tensor | None] = (None, None)
    if norm_weight is None or norm_bias is None:
        total = grad_x.clone(memory_format=torch.contiguous_format)
    else:
        wide = mean.dtype
        grad, values, weight, bias = (
            tensor.to(wide) for tensor in (grad_normed, x, norm_weight, norm_bias)
        )
        total, *on_norm = torch.ops.aten.native_layer_norm_backward(
            grad, values, weight.shape, mean, rstd, weight, bias, [True, *needs_norm]
        )
        total = total.add_(grad_x).to(x.dtype)
    total = rows(total)
    operand = total.to(dtype)
    column_sum = operand.sum(0) if needs_column_sum else None
    return OnSum(total, operand, column_sum, *on_norm)


def gelu_backward(
    grad: Tensor, hidden: Tensor, needs_activated: bool, needs_column_sum: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Turns the gradient (rows, H) of `gelu(hidden)` into that of hidden, in place.

    Returns gelu(hidden) and the sum (H,) of the new gradient over the rows, None where not needed.
    """
    activated = F.gelu(hidden) if needs_activated else None
    torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    return activated, grad.sum(0) if needs_column_sum else None


TORCH_STEPS = Steps(hidden_layer, add_and_norm, add_and_norm_backward, gelu_backward)


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


def rows(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C)."""
    return tensor.reshape(-1, tensor.shape[-1])


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


def short(dtype: torch.dtype) -> str:
    """The dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
