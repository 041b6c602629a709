"""The compiled CUDA implementation: csrc/cuda/mask_postprocess.cu, both resizes in one kernel.

Nothing is copied to the device and no shape depends on values, so that CUDA graphs can hold every launch.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from refsam_kernels.core import libraries

_library = libraries.load("cuda")


def not_supported_reasons(tensor: Tensor, *settings: Any) -> list[str]:
    """Why the library has no kernels for the device of the logits or words; empty if it has."""
    return libraries.reasons_against_device(tensor)


bits_not_supported_reasons = runs_not_supported_reasons = not_supported_reasons


def forward(
    logits: Tensor,
    image_size: int,
    input_size: Sequence[int],
    output_size: Sequence[int],
    threshold: float,
) -> Tensor:
    """Float32 logits (P, 4h, 4w) to masks (P, H, W) bool."""
    return _library.mask_postprocess(
        logits.contiguous(), image_size, input_size, output_size, threshold
    )


def bits(
    logits: Tensor,
    image_size: int,
    input_sizes: Sequence[int],
    output_sizes: Sequence[int],
    threshold: float,
    stability_offset: float,
) -> tuple[Tensor, Tensor]:
    """Like `reference.bits`, of float32 logits."""
    return _library.mask_postprocess_bits(
        logits.contiguous(), image_size, input_sizes, output_sizes, threshold, stability_offset
    )


def runs(words: Tensor, output_sizes: Sequence[int], capacity: int) -> tuple[Tensor, Tensor]:
    """Like `reference.runs`."""
    return _library.mask_postprocess_runs(words.contiguous(), output_sizes, capacity)
