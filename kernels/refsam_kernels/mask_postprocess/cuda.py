"""The compiled CUDA implementation: csrc/cuda/mask_postprocess.cu, both resizes in one kernel.

Nothing is copied to the device and no shape depends on values, so that CUDA graphs can hold every launch.
"""

from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.mask_postprocess.inputs import Bits, BitsInputs, Inputs, Runs, RunsInputs

_library = libraries.load("cuda")


def not_supported_reasons(inputs: Inputs | BitsInputs | RunsInputs) -> list[str]:
    """Why the library has no kernels for the device of the logits or words; empty if it has."""
    return libraries.reasons_against_device(inputs[0])


bits_not_supported_reasons = runs_not_supported_reasons = not_supported_reasons


def forward(inputs: Inputs) -> Tensor:
    """Float32 logits (P, 4h, 4w) to masks (P, H, W) bool."""
    logits, *settings = inputs
    return _library.mask_postprocess(logits.contiguous(), *settings)


def bits(inputs: BitsInputs) -> Bits:
    """Like `reference.bits`, of float32 logits."""
    logits, *settings = inputs
    return Bits(*_library.mask_postprocess_bits(logits.contiguous(), *settings))


def runs(inputs: RunsInputs) -> Runs:
    """Like `reference.runs`."""
    words, *settings = inputs
    return Runs(*_library.mask_postprocess_runs(words.contiguous(), *settings))
