"""mask_postprocess in CUDA."""

from tests.kernels.emulator import DEVICE
from tests.kernels.mask_postprocess_cases import AnySizeCases, LibraryCases


class TestCuda(AnySizeCases):
    backend = "cuda"
    device = DEVICE


class TestCudaLibrary(LibraryCases):
    library = "cuda"
    device = DEVICE
