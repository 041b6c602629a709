"""`adapter_mlp`'s forward with the steps between torch's matrix products in CUDA; see feed_forward_cuda.py."""

from functools import partial
from typing import Any

from torch import Tensor

from refsam_kernels.adapter_mlp import fallback
from refsam_kernels.feed_forward import reasons_against
from refsam_kernels.feed_forward_cuda import CUDA_STEPS
from refsam_kernels.libraries import reasons_against_device

forward = partial(fallback.forward, steps=CUDA_STEPS)


def not_supported_reasons(normed: Tensor, residual: Tensor, *_: Any) -> list[str]:
    """Why these cannot be computed here."""
    return reasons_against(normed, residual) + reasons_against_device(normed)
