"""Fused operators for models built on SAM's image encoder and mask decoder.

Every operator is a function that works on any device, is differentiable (the 8-bit ones are not) and is one node for
`torch.compile`. Importing this package compiles nothing, prints nothing and does not start CUDA. `python -m refsam_kernels.info`
lists the backends that would run here.
"""

import warnings
from typing import Any

from refsam_kernels.adapter_mlp.op import adapter_mlp
from refsam_kernels.adapter_projection.op import adapter_projection
from refsam_kernels.core.decomposition import decompositions
from refsam_kernels.core.dispatch import BackendError, use_backend
from refsam_kernels.core.flops import flop_formulas
from refsam_kernels.core.streams import is_capturing, settle
from refsam_kernels.dense_attention.op import dense_attention
from refsam_kernels.feed_forward.mlp import AdapterWeights, MLPWeights
from refsam_kernels.fingerprint import Fingerprint
from refsam_kernels.int8_linear.op import int8_linear, int8_mlp, multiplies_int8, say_if_slow
from refsam_kernels.int8_linear.weights import Int8Weights, quantise_weights
from refsam_kernels.mask_loss.op import mask_loss
from refsam_kernels.mask_postprocess.op import mask_postprocess
from refsam_kernels.mask_postprocess.packed import (
    MaskStatistics,
    PackedMasks,
    mask_postprocess_bits,
    mask_postprocess_rle,
)
from refsam_kernels.mask_upscale.op import mask_upscale
from refsam_kernels.packed_linear import PackedLinear, can_prepack, has_bfloat16
from refsam_kernels.rel_pos_attention.op import rel_pos_attention, resize_table
from refsam_kernels.token_image_attention.op import AttentionWeights, token_image_attention

__all__ = [
    "AdapterWeights",
    "AttentionWeights",
    "BackendError",
    "Fingerprint",
    "Int8Weights",
    "MLPWeights",
    "MaskStatistics",
    "PackedLinear",
    "PackedMasks",
    "adapter_mlp",
    "adapter_projection",
    "can_prepack",
    "decompositions",
    "dense_attention",
    "flop_formulas",
    "has_bfloat16",
    "int8_linear",
    "int8_mlp",
    "is_capturing",
    "mask_loss",
    "mask_postprocess",
    "mask_postprocess_bits",
    "mask_postprocess_rle",
    "mask_upscale",
    "multiplies_int8",
    "quantise_weights",
    "rel_pos_attention",
    "resize_table",
    "say_if_slow",
    "settle",
    "token_image_attention",
    "use_backend",
]

_RENAMED = {"packs": "can_prepack"}  # for one minor version, as docs/stability.md promises


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    message = (
        f"{__name__}.{name} is now {__name__}.{new}; the old name goes with the next minor version"
    )
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return globals()[new]
