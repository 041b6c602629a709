"""The compiled CUDA implementation of the forward, csrc/cuda/dense_attention.cu: the absorbed form in one kernel."""

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.core.reasons import KERNEL_DTYPES, dtype_reasons
from refsam_kernels.dense_attention.inputs import Inputs, kernel_reasons

_library = libraries.load("cuda")


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernel cannot compute these."""
    of_scalars = dtype_reasons(KERNEL_DTYPES, inputs.scale, inputs.level_weights)
    on_device = libraries.reasons_against_device(inputs.features)
    return kernel_reasons(inputs) + of_scalars + on_device


def forward(inputs: Inputs) -> Tensor:
    """Like `reference.forward`: products in the dtype of the features, sums and softmax in float32."""
    features, text, *others = inputs
    absorbed = F.linear(text, inputs.weight.chunk(2, dim=1)[1])
    tensors = (features, text, absorbed, *others)
    return _library.dense_attention(*(tensor.contiguous() for tensor in tensors))
