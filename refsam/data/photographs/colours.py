"""The names of colours, measured on pixels."""

import numpy as np
from numpy.typing import NDArray

NAMES = (
    "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black", "white", "grey"
)  # fmt: skip
_NAMELESS = len(NAMES)
# An object has a colour if at least the first share of its pixels has it and no other colour has more than the second; it
# certainly does not have a colour that less than the third share has.
_MOST, _OTHER, _NONE = 0.55, 0.25, 0.02
_PIXELS = 1500


def name_pixels(rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The place in `NAMES` of each pixel's colour, (N,), `len(NAMES)` where no name is clear; rgb (N, 3)."""
    values = rgb.astype(np.float32) / 255
    value, low = values.max(1), values.min(1)
    chroma = value - low
    saturation = chroma / np.maximum(value, 1e-6)
    r, g, b = values.T
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(
        value == r, (g - b) / safe % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    hue = hue * 60
    conditions = {
        "black": (value < 0.17) | ((value < 0.26) & (saturation < 0.45)),
        "white": (saturation < 0.12) & (value > 0.78),
        "grey": (saturation < 0.13) & (value < 0.7),
        "brown": _between(hue, 8, 42) & (saturation > 0.33) & (value < 0.6),
        "pink": (_between(hue, 310, 348) & (saturation > 0.18) & (value > 0.6))
        | ((_between(hue, 345, 360) | (hue < 12)) & _between(saturation, 0.2, 0.5) & (value > 0.8)),
        "red": ((hue < 11) | (hue > 345)) & (saturation > 0.55),
        "orange": _between(hue, 16, 40) & (saturation > 0.6) & (value > 0.65),
        "yellow": _between(hue, 43, 68) & (saturation > 0.4) & (value > 0.55),
        "green": _between(hue, 75, 163) & (saturation > 0.2),
        "cyan": _between(hue, 168, 194) & (saturation > 0.3),
        "blue": _between(hue, 198, 252) & (saturation > 0.28),
        "purple": _between(hue, 258, 305) & (saturation > 0.22),
    }
    return np.select(
        list(conditions.values()), [NAMES.index(name) for name in conditions], _NAMELESS
    )


def _between(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.bool_]:
    return (values >= low) & (values <= high)


def shares(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Share of pixels (N, 3) of each colour of `NAMES`, (len(NAMES),); at most some thousand pixels are used."""
    step = max(1, len(pixels) // _PIXELS)
    counts = np.bincount(name_pixels(pixels[::step]), minlength=len(NAMES) + 1)
    return counts[:-1] / max(1, counts.sum())


def colour_of(pixels: NDArray[np.uint8]) -> str | None:
    """The one colour that an object's pixels (N, 3) have, None where no name is clear."""
    by_share = shares(pixels)
    first, second = np.argsort(-by_share)[:2]
    return NAMES[first] if by_share[first] >= _MOST and by_share[second] <= _OTHER else None


def colours_without(pixels: NDArray[np.uint8]) -> list[str]:
    """The colours that almost none of the pixels (N, 3) has."""
    return [name for name, share in zip(NAMES, shares(pixels), strict=True) if share < _NONE]
