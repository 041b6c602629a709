"""The compiled CPU implementation: csrc/cpu/mask_postprocess.cpp, both resizes in one pass over a band of rows."""

from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.mask_postprocess.inputs import Bits, BitsInputs, Inputs, Runs, RunsInputs

_library = libraries.load("cpu")


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
