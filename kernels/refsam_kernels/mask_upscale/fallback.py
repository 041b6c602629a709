"""Mask upscaling as two matrix products over channels-last pixels.

A transposed convolution with kernel 2 and stride 2 has no overlap: every input pixel becomes four output pixels by a matrix
product, so pixels stay rows and channels columns until the end. Only the M masks, not the C/8 channels, are shuffled into place.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.registration import gradients_by_vjp


def forward(
    features: Tensor,
    hyper: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    eps: float,
) -> Tensor:
    """Like `reference.forward`: products in the dtype of the features, LayerNorm in float32 at least."""
    expressions, height, width, _ = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    x = _quadruple(features.flatten(1, 2), conv1_weight, conv1_bias)
    x = F.layer_norm(x.to(dtype), x.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    x = F.gelu(_quadruple(F.gelu(x).to(features.dtype), conv2_weight, conv2_bias))
    masks = hyper @ x.mT  # (P, M, pixels): per pixel of the features 2 x 2 blocks of 2 x 2
    masks = masks.unflatten(2, (height, width, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return masks.reshape(expressions, -1, 4 * height, 4 * width)


def _quadruple(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A transposed convolution, kernel 2, stride 2: (P, n, C) -> (P, 4n, out), the 2 x 2 results of a pixel together."""
    columns = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * out, C)
    return F.linear(x, columns, bias.repeat(4)).unflatten(2, (4, -1)).flatten(1, 2)


def backward(
    grad: Tensor,
    features: Tensor,
    hyper: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Like `reference.backward`; the upscaled features are computed again."""
    inputs = (
        features,
        hyper,
        conv1_weight,
        conv1_bias,
        norm_weight,
        norm_bias,
        conv2_weight,
        conv2_bias,
    )
    return gradients_by_vjp(lambda *tensors: forward(*tensors, eps), inputs, needs, (grad,))
