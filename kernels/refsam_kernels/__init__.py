"""Fused operators for models built on SAM's image encoder and mask decoder.

Every operator is a function that works on any device, is differentiable and is one node for
`torch.compile`. Importing this package compiles nothing, prints nothing and does not start CUDA;
`python -m refsam_kernels.info` says what would run here.
"""

from refsam_kernels.dispatch import BackendError, use_backend

__all__ = ["BackendError", "use_backend"]
