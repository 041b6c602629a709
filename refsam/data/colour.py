"""Changes of colour, in batches and on the device of the frames: all of them together are one 3 x 3 matrix per clip."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
# RGB to YIQ, whose second and third rows span the plane of hues (NTSC).
_YIQ = (_LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


def adjust_colour(frames: Tensor, factors: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Frames (B, T, H, W, 3) uint8 RGB with the colours of each clip changed by its factors (B, 4), uint8 again.

    Factors are those of brightness (p -> b p), contrast (about the clip's mean luma), saturation (about each pixel's luma) and a
    turn of hue (in full circles, luma kept), in this order; (1, 1, 1, 0) changes nothing. `sizes` (height, width) of the
    clips: the pixels outside are padding, zeros, and do not count in a mean. Rounded and clamped once, at the end.
    """
    factors = factors.to(frames.device, torch.float32)
    brightness, contrast, saturation, hue = factors.T
    luma = torch.tensor(_LUMA, device=frames.device)
    pixels = frames.float()
    areas = [frames.shape[1] * height * width for height, width in sizes]
    total = pixels.sum(dim=(1, 2, 3)) @ luma
    mean = brightness * total / torch.tensor(areas, dtype=torch.float32, device=frames.device)
    # s p + (1 - s) luma(p) changes the saturation.
    grey = (1 - saturation)[:, None, None] * luma.expand(3, 3)
    saturated = saturation[:, None, None] * torch.eye(3, device=luma.device) + grey
    matrix = _hue_matrix(hue) @ saturated
    matrix = matrix * (brightness * contrast)[:, None, None]
    # Neither matrix changes a grey, so the constant that contrast adds can be added last.
    offset = ((1 - contrast) * mean)[:, None, None]
    changed = torch.baddbmm(offset, pixels.flatten(1, 3), matrix.mT).view_as(pixels)
    return changed.round_().clamp_(0, 255).to(torch.uint8)


def _hue_matrix(hue: Tensor) -> Tensor:
    """(B, 3, 3): a turn of the plane of hues by a share of the full circle."""
    cosine, sine = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    turn = torch.zeros(len(hue), 3, 3, device=hue.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = cosine
    turn[:, 1, 2], turn[:, 2, 1] = -sine, sine
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    back = torch.linalg.inv(to_yiq).to(hue.device, torch.float32)
    return back @ turn @ to_yiq.to(hue.device, torch.float32)
