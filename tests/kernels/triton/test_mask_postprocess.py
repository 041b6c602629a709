"""mask_postprocess in Triton."""

from tests.kernels.interpreter import DEVICE
from tests.kernels.mask_postprocess_cases import MaskPostprocessCases


class TestTriton(MaskPostprocessCases):
    """Reductions by more than its taps reach are left to other backends."""

    backend = "triton"
    device = DEVICE
