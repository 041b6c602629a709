"""SAM's MLP with a parallel adapter, the residual and the layer norm that follows; see README.md."""

from refsam_kernels.adapter_mlp.op import adapter_mlp

__all__ = ["adapter_mlp"]
