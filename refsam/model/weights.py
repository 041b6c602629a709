"""When weights have changed: what caches that depend on them compare."""

from refsam_kernels import weights_key

__all__ = ["weights_key"]
