"""`adapter_projection` with the steps between torch's matrix products in Triton; see feed_forward/triton_steps.py."""

from functools import partial

from refsam_kernels.adapter_projection import fallback
from refsam_kernels.core.triton_aot import CompileCase
from refsam_kernels.feed_forward.mlp import not_supported_reasons
from refsam_kernels.feed_forward.triton_steps import TRITON_STEPS, row_cases

__all__ = ["backward", "compile_cases", "forward", "not_supported_reasons"]

forward = partial(fallback.forward, steps=TRITON_STEPS)
backward = partial(fallback.backward, steps=TRITON_STEPS)


def compile_cases() -> list[CompileCase]:
    """The kernels on rows; `adapter_mlp` lists the others."""
    return row_cases(has_norm=True)
