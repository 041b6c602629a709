"""adapter_projection in CUDA C++: the kernels are those of adapter_mlp, whose tests say more."""

from tests.kernels.adapter_projection_cases import SIZES, AdapterProjectionCases
from tests.kernels.backend_cases import CudaCases


class TestCuda(CudaCases, AdapterProjectionCases):
    sizes = SIZES | {"several-warps": ((3, 1), 600, 4)}
