"""`adapter_mlp`'s forward with the steps between torch's matrix products in CUDA; see feed_forward/cuda_steps.py."""

from functools import partial

from refsam_kernels.adapter_mlp import fallback
from refsam_kernels.adapter_mlp.inputs import Inputs
from refsam_kernels.core.libraries import reasons_against_device
from refsam_kernels.feed_forward.cuda_steps import CUDA_STEPS
from refsam_kernels.feed_forward.mlp import reasons_against

forward = partial(fallback.forward, steps=CUDA_STEPS)


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernels cannot compute these."""
    tokens = inputs.normed
    return reasons_against(tokens, inputs.residual) + reasons_against_device(tokens)
