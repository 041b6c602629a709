"""dense_attention in Triton."""

from tests.kernels.backend_cases import TritonCases
from tests.kernels.dense_attention_cases import DenseAttentionCases


class TestTriton(TritonCases, DenseAttentionCases):
    pass
