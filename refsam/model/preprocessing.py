"""From frames to the model's square of pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from refsam.model.features import FrameSize


def preprocess(
    frames: Tensor,
    image_size: int,
    pixel_mean: Tensor,
    pixel_std: Tensor,
    patch_size: int | None = None,
) -> tuple[Tensor, FrameSize]:
    """Frames (B, H, W, 3) uint8 RGB to normalised pixels (B, 3, S, S) and their sizes.

    The longest side becomes S = image_size by antialiased bilinear resizing of 8-bit values, mean and
    standard deviation (3, 1, 1) apply to 0-255, and zeros pad right and bottom (segment-anything,
    utils/transforms.py and modeling/sam.py). With a patch_size they pad to whole patches only, and the
    pixels are (B, 3, h, w). The result has the mean's dtype. Raises ValueError for other shapes or dtypes.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"frames: got {frames.dtype} of shape {tuple(frames.shape)}, "
            "wanted uint8 of shape (B, H, W, 3)"
        )
    height, width = frames.shape[1:3]
    if not height or not width:
        raise ValueError(f"frames: got empty frames of shape {tuple(frames.shape)}")
    scale = image_size / max(height, width)
    resized = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    pixels = frames.permute(0, 3, 1, 2)
    if resized != (height, width):
        pixels = _resize_bytes(pixels, resized)
    pixels = (pixels.to(pixel_mean.dtype) - pixel_mean) / pixel_std
    filled = [-(-side // patch_size) * patch_size if patch_size else image_size for side in resized]
    padding = (0, filled[1] - resized[1], 0, filled[0] - resized[0])
    return F.pad(pixels, padding), FrameSize((height, width), resized)


def _resize_bytes(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of (B, 3, H, W) uint8; only the CPU does it in whole numbers."""
    if pixels.device.type == "cpu":
        return F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return F.interpolate(pixels.float(), size, mode="bilinear", antialias=True).round_()
