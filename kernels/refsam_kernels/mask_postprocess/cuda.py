"""The compiled CUDA implementation: csrc/cuda/mask_postprocess.cu, both resizes in one kernel.

Nothing is copied to the device and no shape depends on values, so that CUDA graphs can hold every launch.
"""

from refsam_kernels.core import libraries
from refsam_kernels.mask_postprocess.compiled import calls_of
from refsam_kernels.mask_postprocess.inputs import BitsInputs, Inputs, RunsInputs

forward, bits, runs = calls_of(libraries.load("cuda"))


def not_supported_reasons(inputs: Inputs | BitsInputs | RunsInputs) -> list[str]:
    """Why the library has no kernels for the device of the logits or words; empty if it has."""
    return libraries.reasons_against_device(inputs[0])


bits_not_supported_reasons = runs_not_supported_reasons = not_supported_reasons
