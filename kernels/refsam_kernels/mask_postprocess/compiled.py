"""The calls of a compiled library, which those for CPUs and for GPUs have in common."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from refsam_kernels.mask_postprocess.inputs import Bits, BitsInputs, Inputs, Runs, RunsInputs

Calls = tuple[
    Callable[[Inputs], Tensor], Callable[[BitsInputs], Bits], Callable[[RunsInputs], Runs]
]


def calls_of(library: Any) -> Calls:
    """`forward`, `bits` and `runs` of a backend, of float32 logits and of words."""

    def forward(inputs: Inputs) -> Tensor:
        logits, *settings = inputs
        return library.mask_postprocess(logits.contiguous(), *settings)

    def bits(inputs: BitsInputs) -> Bits:
        logits, *settings = inputs
        return Bits(*library.mask_postprocess_bits(logits.contiguous(), *settings))

    def runs(inputs: RunsInputs) -> Runs:
        words, *settings = inputs
        return Runs(*library.mask_postprocess_runs(words.contiguous(), *settings))

    return forward, bits, runs
