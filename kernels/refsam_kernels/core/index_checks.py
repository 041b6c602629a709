"""Checks of the values of small index tensors, and masks of valid entries.

Values are checked where that is free: in eager mode on the CPU. On other devices a check would synchronise, under
`torch.compile` break the graph; there the caller is trusted.
"""

from math import isfinite

import torch
from torch import Tensor

from refsam_kernels.core.checks import require


def valid_positions(lengths: Tensor, size: int) -> Tensor:
    """Mask (P, size) bool of valid entries, True for the first `lengths[i]`, from lengths (P,) int64."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raises `ValueError` unless low <= values <= high, where they can be seen."""
    if _can_be_seen(tensor):
        least, greatest = (value.item() for value in tensor.detach().aminmax())
        got = f"values from {least} to {greatest}"
        require(low <= least and greatest <= high, name, got, f"values from {low} to {high}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises `ValueError` if a value is NaN or infinite, where they can be seen."""
    # NaN is the least and the greatest of all; looking at every value on its own takes 20 times as long.
    if _can_be_seen(tensor) and not all(map(isfinite, map(float, tensor.detach().aminmax()))):
        count = int((~torch.isfinite(tensor)).sum())
        require(False, name, f"{count} of {tensor.numel()} values not finite", "finite values")


def _can_be_seen(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not torch.compiler.is_compiling()
