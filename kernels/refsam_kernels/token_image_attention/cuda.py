"""The compiled CUDA implementation of the forward, csrc/cuda/token_image_attention.cu, after torch's projections."""

import torch

from refsam_kernels.core import libraries
from refsam_kernels.core.reasons import KERNEL_DTYPES, dtype_reasons, limit_reasons
from refsam_kernels.token_image_attention.fallback import without_padding
from refsam_kernels.token_image_attention.inputs import Inputs, Outputs
from refsam_kernels.token_image_attention.projection import Projection

WIDEST = 512  # as csrc/cuda/token_image_attention.h
WIDEST_HEAD = 128  # as csrc/cuda/token_image_attention.h

_library = libraries.load("cuda")


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernels cannot compute these."""
    queries, q_weight = inputs.queries, inputs.q_weight
    (internal, channels), head = q_weight.shape, len(q_weight) // inputs.num_heads
    limits = limit_reasons(
        ("channels", channels, WIDEST),
        ("internal channels", internal, WIDEST),
        ("channels in a head", head, WIDEST_HEAD),
    )
    tensors = (queries, q_weight, inputs.norm_weight, inputs.norm_bias)
    reasons = dtype_reasons(KERNEL_DTYPES, *tensors) + limits
    return reasons + libraries.reasons_against_device(queries)


def forward(inputs: Inputs) -> Outputs:
    """Like `reference.forward`: products in the dtype of the weights, sum, softmax and LayerNorm in float32."""
    keep = inputs.keep
    if keep:  # the kernel does not look at padding, but kept values must be finite
        inputs = without_padding(inputs)
    queries, keys, query_pe, key_pe = inputs[:4]
    q_weight, q_bias, k_weight, _, v_weight, v_bias, out_weight, out_bias = inputs.weights
    key_lengths = inputs.key_lengths
    whole, remember = slice(len(queries)), not keep
    q = Projection(queries, query_pe, q_weight, q_bias, remember=remember)(whole)
    k = Projection(keys, key_pe, k_weight, None, remember=remember)(whole)
    v = Projection(keys, None, v_weight, None)(whole)
    added = torch.addmv(out_bias, out_weight, v_bias)
    lengths = key_lengths if key_lengths is None else key_lengths.contiguous()
    tensors = (q, k, v, queries, out_weight, added, inputs.norm_weight, inputs.norm_bias)
    out, x, statistics, attended, log_sum_exp = _library.token_image_attention(
        *(tensor.contiguous() for tensor in tensors), lengths, inputs.num_heads, inputs.eps, keep
    )
    if not keep:
        q, k, v = (queries.new_empty(0) for _ in range(3))
    return Outputs(out, x, statistics, q, k, v, attended, log_sum_exp)
