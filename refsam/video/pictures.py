"""From a decoded picture to RGB as a viewer shows it: colours, transparency, turns and flips."""

from fractions import Fraction

import av
import numpy as np
from av.buffer import Buffer

from refsam.images import on_white

# Nobody sees such a difference; rounding to whole macroblocks produces it.
_NEAR_SQUARE = Fraction(2, 100)
_LARGEST_ASPECT = 8  # beyond it the number is wrong rather than the pixels long
_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273


def to_rgb(frame: av.VideoFrame) -> tuple[np.ndarray, bool]:
    """A picture as ``(H, W, 3)`` uint8 RGB, turned and mirrored as its display matrix says; whether rows became columns."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    # A palette has its transparency in the colours, not in a component.
    if has_alpha or frame.format.has_palette:
        image = on_white(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return _displayed(image, bytes(matrix)) if isinstance(matrix, Buffer) else (image, False)


def _displayed(image: np.ndarray, matrix: bytes) -> tuple[np.ndarray, bool]:
    """Apply a display matrix (nine int32; x' = a x + c y, y' = b x + d y), to the nearest quarter turn."""
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    transposed = abs(a) + abs(d) < abs(b) + abs(c)
    if transposed:
        image = image.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        image = image[:, ::-1]
    if d < 0:
        image = image[::-1]
    return np.ascontiguousarray(image), transposed


def pixel_aspect(ratio: Fraction | None) -> Fraction:
    """Width of a pixel by its height, from the ratio in a file; 1 if that is missing, nearly 1 or impossible."""
    if not ratio or abs(ratio - 1) <= _NEAR_SQUARE:
        return Fraction(1)
    return ratio if 1 / Fraction(_LARGEST_ASPECT) <= ratio <= _LARGEST_ASPECT else Fraction(1)


def peculiarities(frame: av.VideoFrame) -> list[str]:
    """Notes on corrections that a viewer would apply to the picture and refsam does not."""
    notes = []
    if curve := _HDR.get(frame.color_trc):
        paler = "colours are paler than a viewer shows them"
        notes.append(f"HDR ({curve}) is read without tone mapping: {paler}")
    if frame.interlaced_frame:
        notes.append(
            "interlaced: both fields of a frame are segmented as one picture, combs and all"
        )
    return notes
