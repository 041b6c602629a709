"""Photographs that scikit-image and scikit-learn ship, as backgrounds."""

from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refsam.errors import UserError
from refsam.images import read_image

_SHORT_SIDE = 320
_TRAINED = (
    "skimage/brick.png skimage/grass.png skimage/text.png skimage/page.png skimage/rocket.jpg skimage/moon.png "
    "skimage/retina.jpg skimage/cell.png skimage/clock_motion.png sklearn/china.jpg"
).split()
# The benchmark's backgrounds, which training never uses.
_HELD_OUT = (
    "skimage/coffee.png skimage/gravel.png skimage/coins.png skimage/hubble_deep_field.jpg sklearn/flower.jpg"
).split()


@cache
def photographs(held_out: bool) -> tuple[Tensor, ...]:
    """The photographs of one side of the split, each (3, h, w) float32 RGB in 0..1 with a short side of 320 pixels.

    Those for training come with their channels in every order, because few of them have much colour, and a model that sees
    little colour in backgrounds takes every coloured area for an object.

    Raises UserError where scikit-image or scikit-learn is not installed.
    """
    try:
        import skimage
        import sklearn
    except ImportError as error:
        raise UserError(
            f"generated clips with photographs need scikit-image and scikit-learn ({error}): pip install 'refsam[train]'"
        ) from error
    folders = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.__file__).parent / "datasets" / "images",
    }
    names = _HELD_OUT if held_out else _TRAINED
    images = [_load(folders[name.split("/")[0]] / name.split("/")[1]) for name in names]
    if held_out:
        return tuple(images)
    return tuple(recoloured for image in images for recoloured in _recoloured(image))


def _recoloured(image: Tensor) -> list[Tensor]:
    """The image with its channels in every order, alone if it is grey."""
    is_grey = bool((image[0] == image[1]).all() and (image[1] == image[2]).all())
    return [image] if is_grey else [image[list(order)] for order in permutations(range(3))]


def _load(path: Path) -> Tensor:
    image, _ = read_image(path)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    scale = _SHORT_SIDE / min(pixels.shape[1:])
    size = [round(side * scale) for side in pixels.shape[1:]]
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
