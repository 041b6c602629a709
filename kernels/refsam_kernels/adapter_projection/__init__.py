"""SAM's attention projection with an adapter, the residual and the layer norm that follows; see README.md."""

from refsam_kernels.adapter_projection.op import adapter_projection

__all__ = ["adapter_projection"]
