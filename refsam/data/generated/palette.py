"""Colours of the generated objects: names, and the range of hue, saturation and value that each name covers."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Colour:
    """A colour name with its range: hue in degrees, saturation and value in 0..1."""

    name: str
    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


COLOURS = (
    Colour("red", (-10, 9), (0.65, 1.0), (0.45, 1.0)),
    Colour("orange", (19, 35), (0.75, 1.0), (0.75, 1.0)),
    Colour("yellow", (46, 62), (0.55, 1.0), (0.72, 1.0)),
    Colour("green", (85, 155), (0.4, 1.0), (0.25, 0.95)),
    Colour("cyan", (170, 190), (0.5, 1.0), (0.55, 1.0)),
    Colour("blue", (206, 245), (0.5, 1.0), (0.35, 1.0)),
    Colour("purple", (264, 294), (0.4, 1.0), (0.35, 0.95)),
    Colour("pink", (316, 347), (0.28, 0.75), (0.85, 1.0)),
    Colour("brown", (16, 31), (0.45, 0.8), (0.22, 0.48)),
    Colour("black", (0, 360), (0.0, 0.35), (0.02, 0.13)),
    Colour("white", (0, 360), (0.0, 0.07), (0.9, 1.0)),
    Colour("grey", (0, 360), (0.0, 0.1), (0.35, 0.62)),
)


def to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in 0..1, (3,), of a hue in degrees and saturation and value in 0..1."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60.0) % 6.0
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def sample(colour: Colour, random: np.random.Generator) -> np.ndarray:
    """A random RGB in 0..1, (3,), within the range of the colour's name."""
    ranges = (colour.hue, colour.saturation, colour.value)
    return to_rgb(*(random.uniform(*each) for each in ranges))
