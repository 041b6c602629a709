"""Random crop, scale, flip and motion of a clip, the same for all of its frames."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass as settings_dataclass

Probability = Annotated[float, Field(ge=0.0, le=1.0)]

# SAM's mean colour fills the area that a moved picture does not cover.
_FILL = (124, 116, 104)


@settings_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Augmentation:
    """Ranges that each clip's augmentation is drawn from; defaults are the authors' for training on Ref-YouTube-VOS.

    `flip` is the probability of a clip flipped left to right, expressions too. With probability `crop` a clip is scaled to
    a short side out of `crop_from` and cut to sides of `crop_sides` (least and most); all sizes are pixels. Then, or instead,
    its short side becomes one of `short_sides`, its long side at most `long_side`. `colour` is the probability of each of the
    changes of brightness, contrast, saturation and hue. Single images are moved by up to `rotation` degrees and `shift` and
    `zoom` of their size.
    """

    flip: Probability = 0.5
    crop: Probability = 0.5
    crop_from: tuple[PositiveInt, ...] = (400, 500, 600)
    crop_sides: tuple[PositiveInt, PositiveInt] = (384, 600)
    short_sides: tuple[PositiveInt, ...] = (288, 320, 352, 392, 416, 448, 480, 512)
    long_side: PositiveInt = 640
    colour: Probability = 0.7
    rotation: NonNegativeFloat = 10.0
    shift: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    zoom: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1


@dataclass(frozen=True)
class Geometry:
    """A clip's crop (left, top, right, bottom, as shares of the frame), its new (height, width), and whether it is flipped."""

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    flipped: bool

    def decoded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Smallest (height, width) to decode a frame of `size` at, so that the crop has as many pixels as the result."""
        left, top, right, bottom = self.box
        height, width = self.size[0] / (bottom - top), self.size[1] / (right - left)
        return min(size[0], int(np.ceil(height))), min(size[1], int(np.ceil(width)))

    def of_image(self, image: Image.Image) -> NDArray[np.uint8]:
        """The cut of an RGB image, (h, w, 3) uint8, resized with antialiasing."""
        return self._cut(image, Image.Resampling.BILINEAR)

    def of_mask(self, mask: Image.Image) -> NDArray[np.bool_]:
        """The same cut of a mask, an image that is not 0 where the object is: (h, w) bool."""
        return self._cut(mask, Image.Resampling.NEAREST) != 0

    def _cut(self, image: Image.Image, resampling: Image.Resampling) -> NDArray[np.uint8]:
        left, top, right, bottom = self.box
        width, height = image.size
        box = (left * width, top * height, right * width, bottom * height)
        resized = np.asarray(image.resize(self.size[::-1], resampling, box=box))
        return resized[:, ::-1] if self.flipped else resized


def draw_geometry(
    random: np.random.Generator, settings: Augmentation, size: tuple[int, int], may_flip: bool
) -> Geometry:
    """A geometry for frames of `size` (height, width); the aspect is kept."""
    flipped = bool(random.random() < settings.flip) and may_flip
    box = (0.0, 0.0, 1.0, 1.0)
    height, width = size
    if random.random() < settings.crop:
        scale = random.choice(settings.crop_from) / min(size)
        shares = [
            min(1.0, random.integers(*settings.crop_sides, endpoint=True) / (side * scale))
            for side in size
        ]
        top, left = (random.uniform(0.0, 1.0 - share) for share in shares)
        box = (left, top, min(1.0, left + shares[1]), min(1.0, top + shares[0]))
        height, width = height * shares[0], width * shares[1]
    scale = min(
        random.choice(settings.short_sides) / min(height, width),
        settings.long_side / max(height, width),
    )
    return Geometry(box, (max(1, round(height * scale)), max(1, round(width * scale))), flipped)


def draw_colour(random: np.random.Generator, settings: Augmentation) -> NDArray[np.float32]:
    """Factors of brightness, contrast and saturation and the turn of hue, (4,) float32, as `adjust_colour` takes them."""
    drawn = np.array([*random.uniform(0.5, 1.5, size=3), random.uniform(-0.1, 0.1)])
    return np.where(random.random(4) < settings.colour, drawn, [1, 1, 1, 0]).astype(np.float32)


@dataclass(frozen=True)
class Motion:
    """The motion of a still image through a clip of `frames` frames, from the first row of `ends` to the second.

    The rows are (angle in radians, zoom, shift to the right, shift down), shifts as shares of the image's sides.
    """

    ends: NDArray[np.float64]
    frames: int

    def moved(self, image: Image.Image, time: int) -> Image.Image:
        """The moved image in one frame, in its own size: RGB bilinear on SAM's mean colour, masks by nearest pixels."""
        share = time / max(1, self.frames - 1)
        angle, zoom, right, down = (1 - share) * self.ends[0] + share * self.ends[1]
        width, height = image.size
        cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
        # From a position in the result back to one in the image, both relative to the middle.
        x, y = width / 2, height / 2
        to_x, to_y = x + right * width, y + down * height
        back_x, back_y = x - cosine * to_x - sine * to_y, y + sine * to_x - cosine * to_y
        matrix = (cosine, sine, back_x, -sine, cosine, back_y)
        colour = image.mode == "RGB"
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix,
            Image.Resampling.BILINEAR if colour else Image.Resampling.NEAREST,
            fillcolor=_FILL if colour else 0,
        )


def draw_motion(random: np.random.Generator, settings: Augmentation, frames: int) -> Motion:
    """Positions of a still image in the first and in the last frame."""
    most = np.array([np.radians(settings.rotation), settings.zoom, settings.shift, settings.shift])
    ends = random.uniform(-most, most, size=(2, 4))
    ends[:, 1] += 1
    return Motion(ends, frames)
