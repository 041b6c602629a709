"""Reasons why a backend cannot run on some arguments, in the same words for every operator."""

import torch
from torch import Tensor

# The dtypes of the Triton and CUDA kernels.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_reasons(supported: tuple[torch.dtype, ...], *tensors: Tensor) -> list[str]:
    """One reason for each dtype of the tensors that is not supported."""
    wanted = ", ".join(map(short, supported))
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    return [f"computes {wanted}, got {short(x)}" for x in dtypes if x not in supported]


def limit_reasons(*limits: tuple[str, int, int]) -> list[str]:
    """One reason for each limit that is passed: the name of what is counted, its number, and the most there may be."""
    return [f"takes at most {most} {name}, got {got}" for name, got, most in limits if got > most]


def short(dtype: torch.dtype) -> str:
    """The dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
