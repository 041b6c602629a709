"""Focal and dice loss from low-resolution logits; see README.md."""

from refsam_kernels.mask_loss.op import mask_loss

__all__ = ["mask_loss"]
