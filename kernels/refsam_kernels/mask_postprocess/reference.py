"""Mask logits to masks as segment-anything does it: `Sam.postprocess_masks` of segment_anything/modeling/sam.py."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def forward(
    logits: Tensor,
    image_size: int,
    input_size: Sequence[int],
    output_size: Sequence[int],
    threshold: float,
) -> Tensor:
    """Logits (P, 4h, 4w) to masks (P, H, W) bool."""
    return resize_twice(logits, image_size, input_size, output_size) > threshold


def resize_twice(
    logits: Tensor, image_size: int, input_size: Sequence[int], output_size: Sequence[int]
) -> Tensor:
    """Logits (P, 4h, 4w), bilinearly to the square of image_size, cropped to input_size, bilinearly to (P, H, W)."""
    height, width = input_size
    square = (image_size, image_size)
    image = F.interpolate(logits.unsqueeze(1), square, mode="bilinear", align_corners=False)
    image = image[..., :height, :width]
    output = F.interpolate(image, tuple(output_size), mode="bilinear", align_corners=False)
    return output.squeeze(1)
