"""The upscaling of SAM's mask decoder and its product with the hypernetworks' outputs.

Follows `MaskDecoder.output_upscaling` and `predict_masks` of segment_anything/modeling/mask_decoder.py and `LayerNorm2d` of
modeling/common.py: in float32 the result has the same bits. SAM 2's decoder adds features of higher resolution behind each
convolution (transformers' `Sam2MaskDecoder`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.gradients import derived_backward
from refsam_kernels.mask_upscale.inputs import Inputs


def forward(inputs: Inputs) -> Tensor:
    """features (P, h, w, C), hyper (P, M, C/8) -> mask logits (P, M, 4h, 4w) like features; in float32 at least."""
    features, hyper, conv1_weight, conv1_bias, norm_weight, norm_bias = inputs[:6]
    conv2_weight, conv2_bias, feat_s1, feat_s0, eps = inputs[6:]
    dtype = torch.promote_types(features.dtype, torch.float32)
    # Viewed as segment-anything views its tokens: for one image the strides, and so the convolution's
    # bits, are not those of `permute`.
    x = features.to(dtype).flatten(1, 2).transpose(1, 2).unflatten(2, features.shape[1:3])
    x = F.conv_transpose2d(x, conv1_weight.to(dtype), conv1_bias.to(dtype), stride=2)
    x = x if feat_s1 is None else x + feat_s1.to(dtype)
    x = F.gelu(layer_norm_2d(x, norm_weight.to(dtype), norm_bias.to(dtype), eps))
    x = F.conv_transpose2d(x, conv2_weight.to(dtype), conv2_bias.to(dtype), stride=2)
    x = F.gelu(x if feat_s0 is None else x + feat_s0.to(dtype))
    logits = hyper.to(dtype) @ x.flatten(2)
    return logits.unflatten(2, x.shape[2:]).to(features.dtype)


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """SAM's LayerNorm over the channels of (P, C, h, w): population variance, eps within the square root."""
    centred = x - x.mean(1, keepdim=True)
    variance = centred.pow(2).mean(1, keepdim=True)
    return weight[:, None, None] * (centred / torch.sqrt(variance + eps)) + bias[:, None, None]


backward = derived_backward(forward, *Inputs._fields[:10])
