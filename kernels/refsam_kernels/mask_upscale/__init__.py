"""The upscaling of SAM's mask decoder; see README.md."""

from refsam_kernels.mask_upscale.op import mask_upscale

__all__ = ["mask_upscale"]
