"""The compiled CUDA implementation of the forward, csrc/cuda/dense_attention.cu: the absorbed form in one kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.dense_attention.inputs import Inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_CHANNELS = 512  # as csrc/cuda/dense_attention.h
MOST_WORDS = 128  # as csrc/cuda/dense_attention.h

_library = libraries.load("cuda")


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernel cannot compute these."""
    features = inputs.features
    channels, words = features.shape[3], inputs.text.shape[1]
    reasons = [
        f"computes float32, float16 and bfloat16, got {dtype}"
        for dtype in dict.fromkeys((features.dtype, inputs.scale.dtype, inputs.level_weights.dtype))
        if dtype not in DTYPES
    ]
    if channels > WIDEST_CHANNELS:
        reasons.append(f"takes at most {WIDEST_CHANNELS} channels, got {channels}")
    if words > MOST_WORDS:
        reasons.append(f"takes at most {MOST_WORDS} words, got {words}")
    return reasons + libraries.reasons_against_device(features)


def forward(inputs: Inputs) -> Tensor:
    """Like `reference.forward`: products in the dtype of the features, sums and softmax in float32."""
    features, text, *others = inputs
    absorbed = F.linear(text, inputs.weight.chunk(2, dim=1)[1])
    tensors = (features, text, absorbed, *others)
    return _library.dense_attention(*(tensor.contiguous() for tensor in tensors))
