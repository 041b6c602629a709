"""`adapter_projection`'s forward with the steps between torch's matrix products in CUDA; see feed_forward/cuda_steps.py."""

from functools import partial

from refsam_kernels.adapter_projection import fallback
from refsam_kernels.feed_forward.cuda_steps import CUDA_STEPS, not_supported_reasons

__all__ = ["forward", "not_supported_reasons"]

forward = partial(fallback.forward, steps=CUDA_STEPS)
