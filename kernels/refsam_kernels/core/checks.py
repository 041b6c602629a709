"""Checks and casts of the arguments of public functions; every message names the argument, its value and the value wanted."""

from typing import Any, TypeGuard

import torch
from torch import Tensor

# Asked once, at import: Dynamo of torch 2.10 and 2.11 cannot trace the question. The meta device is none of them.
AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "maia")
    if torch.amp.is_autocast_available(name)
)


def require(condition: bool, name: str, got: Any, wanted: str) -> None:
    """Raises `ValueError` unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: got {got}, wanted {wanted}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises `ValueError` unless the tensor has this shape; a string names a dimension of any size."""
    if tensor.shape == shape:  # as nearly always: a message takes longer than the check
        return
    fits = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or got == wanted
        for got, wanted in zip(tensor.shape, shape, strict=True)
    )
    require(fits, name, f"shape {tuple(tensor.shape)}", f"({', '.join(map(str, shape))})")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises `ValueError` unless all tensors lie on the first one's device."""
    (first_name, first), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.device != first.device:
            require(False, name, tensor.device, f"{first.device} as {first_name}")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Raises `ValueError` unless the first tensor is floating point and the others share its dtype."""
    (first_name, first), *others = [(name, t) for name, t in tensors.items() if t is not None]
    require(first.is_floating_point(), first_name, first.dtype, "a floating point dtype")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            require(False, name, tensor.dtype, f"{first.dtype} as {first_name}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast wants for matrix products on the device now, or None outside
    autocast.
    """
    if device.type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts the tensors as autocast casts the operands of a matrix product; without autocast they
    stay as they are.

    None stays None, and so do tensors that are not floating point or are float64.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    dtype = autocast_dtype(first.device)
    if dtype is None:
        return tensors
    return tuple(tensor.to(dtype) if is_castable(tensor) else tensor for tensor in tensors)


def is_castable(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether autocast casts such a tensor: floating point, but not float64."""
    return tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
