"""Linear layers and MLPs in 8-bit integers, for inference; see README.md."""

from refsam_kernels.int8_linear.op import int8_linear, int8_mlp
from refsam_kernels.int8_linear.weights import Int8Weights, quantise_weights

__all__ = ["Int8Weights", "int8_linear", "int8_mlp", "quantise_weights"]
