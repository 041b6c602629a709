"""Low-resolution logits to masks of the frame's size; see README.md."""

from refsam_kernels.mask_postprocess.op import mask_postprocess

__all__ = ["mask_postprocess"]
