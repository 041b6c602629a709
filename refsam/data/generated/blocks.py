"""Toy blocks: objects with a print on their face and a bare side beside it."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from refsam.data.generated import palette

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER_SIDE = 32  # pixels
_WOOD = palette.Colour("wood", (20, 45), (0.1, 0.5), (0.25, 0.8))


@dataclass(frozen=True)
class Block:
    """A toy block: a printed face, and a bare side that belongs to no object.

    The face has a panel, which is the outline shrunk to the share `panel` of its radius (0: no panel), and on it the capital
    with number `letter`, of half-height `letter_size`. `side` is the offset of the back, (x, y) in the frame's directions.
    Lengths are in units of the outline, colours (3,) in 0..1.
    """

    panel: float
    panel_rgb: np.ndarray
    letter: int
    letter_size: float
    letter_rgb: np.ndarray
    side: tuple[float, float]
    side_rgb: np.ndarray


def sample_side(random: np.random.Generator) -> tuple[float, float]:
    """Offset (x, y) from the face to the back, the same for all blocks of a scene."""
    angle, depth = random.uniform(0, 2 * np.pi), random.uniform(0, 0.35)
    return depth * np.cos(angle), depth * np.sin(angle)


def sample_block(random: np.random.Generator, rgb: np.ndarray, side: tuple[float, float]) -> Block:
    """A face in the object's colour with a light panel and a letter in that colour, or with a light or dark letter alone."""
    has_panel = random.random() < 0.75
    light = palette.to_rgb(random.uniform(20, 60), random.uniform(0, 0.25), random.uniform(0.8, 1))
    wood = palette.sample(_WOOD, random)
    return Block(
        panel=random.uniform(0.6, 0.82) if has_panel else 0.0,
        panel_rgb=light,
        letter=int(random.integers(len(_ALPHABET))),
        letter_size=random.uniform(0.2, 0.36),
        letter_rgb=rgb if has_panel else light * (random.random() < 0.7),
        side=side,
        side_rgb=wood,
    )


@cache
def letters() -> Tensor:
    """The capitals that a face may show, (26, S, S) float32 in 0..1: how much of each pixel is ink."""
    font = ImageFont.load_default(30)
    middle = (_LETTER_SIDE / 2, _LETTER_SIDE / 2)
    pictures = []
    for letter in _ALPHABET:
        picture = Image.new("L", (_LETTER_SIDE, _LETTER_SIDE))
        ImageDraw.Draw(picture).text(middle, letter, 255, font, anchor="mm", stroke_width=1)
        pictures.append(np.array(picture))
    return torch.from_numpy(np.stack(pictures)).float() / 255
