"""Registration and public functions of `int8_linear`."""

import logging
from math import prod
from typing import Any

import torch
from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.core.checks import check_same_device, check_shape, require
from refsam_kernels.core.flops import Product, counts
from refsam_kernels.core.registration import Operator, needs_gradient
from refsam_kernels.int8_linear.inputs import Inputs
from refsam_kernels.int8_linear.weights import Int8Weights

logger = logging.getLogger("refsam_kernels")
DTYPES = (torch.float32, torch.bfloat16)

operator = Operator("int8_linear", Inputs)


@operator.forward
def _forward(inputs: Inputs) -> Tensor:
    dtype = torch.bfloat16 if inputs.as_bfloat16 else torch.float32
    return inputs.x.new_empty((*inputs.x.shape[:-1], inputs.out_channels), dtype=dtype)


@counts(operator)
def _products(inputs: Any) -> list[Product]:
    rows, hidden = prod(inputs.x[:-1]), inputs.hidden_channels
    if not hidden:
        return [(2 * rows * inputs.in_channels * inputs.out_channels, None)]
    return [(2 * rows * hidden * (inputs.in_channels + inputs.out_channels), None)]


def int8_linear(
    x: Tensor,
    weights: Int8Weights,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer in 8-bit integers: `residual + weights(norm(x))`. Forward only.

    Each row is quantised by itself, to 255 steps between its smallest and its largest value (127 on a processor that has AVX2
    and no instructions for 8-bit products); products are summed exactly in 32 bits. A row with a value that is not finite gives a
    row of NaN, and changes no other row.

    Args:
        x: (..., in) float32 or bfloat16.
        weights: of `quantise_weights`.
        norm: weight and bias (in,) of a layer norm of x, or None.
        residual: (..., out) in the result's dtype, or None.
        eps: added to the norm's variance.
        dtype: of the result, float32 or bfloat16; None for x's.
        backend: name of the backend; None lets the library choose.

    Returns:
        (..., out).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        RuntimeError: autograd would record the call.
        BackendError: the requested backend cannot run.
    """
    return _run(x, weights, None, norm, residual, eps, dtype, backend)


def int8_mlp(
    x: Tensor,
    first: Int8Weights,
    second: Int8Weights,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """An MLP in 8-bit integers: `residual + second(gelu(first(norm(x))))` with the exact GELU. Forward only.

    The hidden values are quantised row by row too; a CPU never writes all of them. Arguments, result and errors as those of
    `int8_linear`; second has as many inputs as first has outputs.
    """
    wanted = f"{first.out_channels} input channels, as many as first's outputs"
    fits = second.in_channels == first.out_channels
    require(fits, "second", f"{second.in_channels} input channels", wanted)
    return _run(x, first, second, norm, residual, eps, dtype, backend)


def multiplies_int8() -> bool:
    """Whether the CPU multiplies 8-bit integers itself (AVX-512 VNNI, AVX-VNNI) and the compiled library is there."""
    try:
        library = libraries.load("cpu")
    except (ImportError, OSError):
        return False
    return bool(library.multiplies_int8(libraries.instruction_set()))


def say_if_slow() -> None:
    """Warns, in the log, where the CPU has no instructions for 8-bit products."""
    if not multiplies_int8():
        logger.warning(
            "int8: this CPU has no instructions for 8-bit products (AVX-512 VNNI, AVX-VNNI), or the library was not "
            "built: slower ones are used"
        )


def _run(
    x: Tensor,
    first: Int8Weights,
    second: Int8Weights | None,
    norm: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    backend: str | None,
) -> Tensor:
    """Checks the arguments and calls the operator."""
    norm_weight, norm_bias = norm or (None, None)
    if norm_weight is not None and norm_bias is not None:
        norm_weight, norm_bias = norm_weight.float(), norm_bias.float()
    behind = (None, None, None, None) if second is None else second.tensors
    last = second or first
    dtype = dtype or x.dtype
    require(dtype in DTYPES, "dtype", dtype, "torch.float32 or torch.bfloat16")
    tensors = (x, *first.tensors, *behind, norm_weight, norm_bias, residual)
    hidden = 0 if second is None else second.in_channels
    sizes = (first.in_channels, hidden, last.out_channels)
    inputs = Inputs(*tensors, *sizes, eps, dtype == torch.bfloat16)  # type: ignore[call-arg]
    _check(inputs, dtype)
    if needs_gradient(*tensors):
        raise RuntimeError(
            "int8_linear: got tensors that require gradients, wanted a call under torch.no_grad() "
            "or torch.inference_mode(): it has no backward"
        )
    return _forward(*inputs, backend or "")


def _check(inputs: Inputs, dtype: torch.dtype) -> None:
    """Raises `ValueError` for arguments that the operator cannot take; dtype is the result's."""
    x, width = inputs.x, inputs.in_channels
    require(x.dtype in DTYPES, "x", x.dtype, "torch.float32 or torch.bfloat16")
    fits = x.dim() > 0 and x.shape[-1] == width
    require(fits, "x", f"shape {tuple(x.shape)}", f"(..., {width}) as the weights have inputs")
    norm = {"norm[0]": inputs.norm_weight, "norm[1]": inputs.norm_bias}
    for name, tensor in norm.items():
        if tensor is not None:
            check_shape(name, tensor, (width,))
    residual = inputs.residual
    if residual is not None:
        check_shape("residual", residual, (*x.shape[:-1], inputs.out_channels))
        require(residual.dtype == dtype, "residual", residual.dtype, f"{dtype} as the result has")
    check_same_device(x=x, **{"weights.packed": inputs.packed, "residual": residual, **norm})
