"""Low-resolution logits to masks of the frame's size; see README.md."""

from refsam_kernels.mask_postprocess.op import mask_postprocess
from refsam_kernels.mask_postprocess.packed import (
    MaskStatistics,
    PackedMasks,
    mask_postprocess_bits,
    mask_postprocess_rle,
)

__all__ = [
    "MaskStatistics",
    "PackedMasks",
    "mask_postprocess",
    "mask_postprocess_bits",
    "mask_postprocess_rle",
]
