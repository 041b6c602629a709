"""`adapter_mlp` with the steps between torch's matrix products in Triton; see feed_forward/triton_steps.py."""

from functools import partial

from refsam_kernels.adapter_mlp import fallback
from refsam_kernels.core.triton_aot import CompileCase
from refsam_kernels.feed_forward.mlp import not_supported_reasons
from refsam_kernels.feed_forward.triton_steps import TRITON_STEPS, gelu_cases, row_cases

__all__ = ["backward", "compile_cases", "forward", "not_supported_reasons"]

forward = partial(fallback.forward, steps=TRITON_STEPS)
backward = partial(fallback.backward, steps=TRITON_STEPS)


def compile_cases() -> list[CompileCase]:
    """The kernels that `adapter_projection` does not list: the GELU's backward, and the sum without a norm."""
    return gelu_cases() + row_cases(has_norm=False)
