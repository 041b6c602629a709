"""The compiled CUDA implementation: csrc/cuda/mask_postprocess.cu, both resizes in one kernel."""

from torch import Tensor

from refsam_kernels import libraries

_library = libraries.load("cuda")


def forward(
    logits: Tensor, image_size: int, input_size: list[int], output_size: list[int], threshold: float
) -> Tensor:
    """Logits (P, 4h, 4w) to masks (P, H, W) bool; see `refsam_kernels.mask_postprocess`."""
    return _library.mask_postprocess(
        logits.float().contiguous(), image_size, input_size, output_size, threshold
    )
