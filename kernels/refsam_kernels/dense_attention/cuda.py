"""The compiled CUDA implementation of the forward, csrc/cuda/dense_attention.cu: the folded form in one kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core import libraries

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_CHANNELS = 512  # as csrc/cuda/dense_attention.h
MOST_WORDS = 128  # likewise

_library = libraries.load("cuda")


def not_supported_reasons(features: Tensor, text: Tensor, *arguments: Any) -> list[str]:
    """Why the kernel cannot take these."""
    channels, words = features.shape[3], text.shape[1]
    scale, level_weights = arguments[-2:]
    reasons = [
        f"computes float32, float16 and bfloat16, got {dtype}"
        for dtype in dict.fromkeys((features.dtype, scale.dtype, level_weights.dtype))
        if dtype not in DTYPES
    ]
    if channels > WIDEST_CHANNELS:
        reasons.append(f"takes at most {WIDEST_CHANNELS} channels, got {channels}")
    if words > MOST_WORDS:
        reasons.append(f"takes at most {MOST_WORDS} words, got {words}")
    return reasons + libraries.reasons_against_device(features)


def forward(
    features: Tensor,
    text: Tensor,
    lengths: Tensor,
    image_index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    level_weights: Tensor,
) -> Tensor:
    """Like `reference.forward`: products in the dtype of the features, sums and softmax in float32."""
    folded = F.linear(text, weight.chunk(2, dim=1)[1])
    tensors = (features, text, folded, lengths, image_index, weight, bias, scale, level_weights)
    return _library.dense_attention(*(tensor.contiguous() for tensor in tensors))
