"""A clip of real things that needs no file of its own: a camera moves past photographs that scikit-image ships.

All three are free of restrictions by scikit-image's documentation: the cat Chelsea (CC0, Stefan van der Walt), a cup of coffee
(CC0, Rachel Michetti), and the astronaut Eileen Collins (NASA, public domain).
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refsam.data.dataset import read_image
from refsam.data.photographs.layers import Layer, Size, draw
from refsam.data.photographs.pictures import without_things
from refsam.errors import UserError

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "astronaut.png")
EXPRESSIONS = ("the cat", "the cup", "the woman", "the dog")
"""Expressions for the clip; the last names an absent object."""


def sample_clip(frames: int = 36, size: Size = (360, 640)) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) uint8 RGB of `size` (height, width): from the cat past the cup to the astronaut, coming closer.

    Raises UserError where scikit-image is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise UserError(
            f"the sample of photographs needs scikit-image ({error}): pip install 'refsam[train]'"
        ) from None
    folder = Path(skimage.__file__).parent / "data"
    images = [np.asarray(read_image(folder / name)[0]) for name in PHOTOGRAPHS]
    # Their widths when they are as high as the frame, as shares of the frame's width; the photographs hang side by side.
    widths = [i.shape[1] / i.shape[0] * size[0] / size[1] for i in images]
    share = np.linspace(0, 1, frames)
    share = share * share * (3 - 2 * share)  # starts and stops gently
    zoom = 1.02 + 0.1 * np.sin(np.pi * share)
    camera = 0.5 + share * (sum(widths) - 1)
    layers, left = [], 0.0
    for image, width in zip(images, widths, strict=True):
        path = np.zeros((frames, 4))
        path[:, 0] = 0.5 + (left + width / 2 - camera) * zoom
        path[:, 1] = 0.5
        path[:, 2] = zoom * 1.006  # without a gap between two of them
        layers.append(Layer(without_things(image), path, False))
        left += width
    return draw(layers, size).frames
