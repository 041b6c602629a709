"""The arguments of `dense_attention`, and the limits of its kernels."""

from typing import NamedTuple

from torch import Tensor

from refsam_kernels.core.reasons import KERNEL_DTYPES, dtype_reasons, limit_reasons

# Limits of the kernels in Triton and CUDA, as csrc/cuda/dense_attention.h has them.
MOST_CHANNELS = 512
MOST_WORDS = 128


class Inputs(NamedTuple):
    """The public function's arguments."""

    features: Tensor
    text: Tensor
    lengths: Tensor
    image_index: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    level_weights: Tensor


def kernel_reasons(inputs: Inputs) -> list[str]:
    """Why the kernels in Triton and CUDA cannot compute these."""
    channels, words = inputs.features.shape[3], inputs.text.shape[1]
    limits = ("channels", channels, MOST_CHANNELS), ("words", words, MOST_WORDS)
    return dtype_reasons(KERNEL_DTYPES, inputs.features) + limit_reasons(*limits)
