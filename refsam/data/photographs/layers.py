"""Pictures laid over each other and moved through a clip, with the exact masks of what is seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from refsam.data.photographs.folder import UNSURE
from refsam.data.photographs.pictures import Picture, Thing

Size = tuple[int, int]
_SHADOW_SCALE = 4  # a shadow is blurred at a fraction of the size
_COVERED = 0.5  # a pixel shows the upper layer if this share of it is covered


@dataclass(frozen=True)
class Layer:
    """A picture that moves through a clip of T frames.

    `path (T, 4)`: x and y of its middle as shares of the frame, its height as a share of the frame's, its angle in degrees.
    `is_cut_out`: only its thing and unsure pixels are laid over, else the whole rectangle. `gain (3,)` multiplies its colours.
    `shadow`: darkness, 0..1, of its shadow on the layers below. `softness`: width of its blended edge, in pixels.
    `first` is the number of its first thing in the clip's `owner`.
    """

    picture: Picture
    path: NDArray[np.float64]
    is_cut_out: bool
    first: int = 1
    gain: NDArray[np.float64] = field(default_factory=lambda: np.ones(3))
    shadow: float = 0.0
    softness: float = 0.7


@dataclass(frozen=True)
class PhotoClip:
    """T frames and what is seen in them.

    `frames (T, H, W, 3)` uint8 RGB; `owner (T, H, W)` uint8 as in `Picture`, numbering `things`; `garments (T, H, W)`
    uint8, 0 for none. `complete`: no object of a class is without a label. `mistaken`: classes that something without a label
    was taken for.
    """

    frames: NDArray[np.uint8]
    owner: NDArray[np.uint8]
    garments: NDArray[np.uint8]
    things: tuple[Thing, ...]
    complete: bool
    garments_known: frozenset[int] = frozenset()
    mistaken: tuple[str, ...] = ()


def cover(layer: Layer, size: Size) -> Layer:
    """The layer, a rectangle, enlarged in each frame until it covers a frame of that size, and moved as little as needed."""
    height, width = layer.picture.owner.shape
    fit = max(1.0, (size[1] / size[0]) * height / width)
    path = layer.path.copy()
    path[:, 2] = np.maximum(path[:, 2], fit)
    tall, wide = path[:, 2], path[:, 2] * width / height * size[0] / size[1]
    path[:, 0] = np.clip(path[:, 0], 1 - wide / 2, wide / 2)
    path[:, 1] = np.clip(path[:, 1], 1 - tall / 2, tall / 2)
    path[:, 3] = 0
    return Layer(layer.picture, path, False, layer.first, layer.gain)


def draw(layers: Sequence[Layer], size: Size, mistaken: Sequence[str] = ()) -> PhotoClip:
    """Lay the layers, from back to front, over each other in every frame of `size` (height, width)."""
    length = len(layers[0].path)
    frames = np.full((length, *size, 3), 127, np.uint8)
    owner = np.zeros((length, *size), np.uint8)
    garments = np.zeros((length, *size), np.uint8)
    for layer in layers:
        for t in range(length):
            _lay(layer, t, frames[t], owner[t], garments[t])
    labelled = (layer for layer in layers if layer.picture.garments is not None)
    known = [layer.first + n for layer in labelled for n in range(len(layer.picture.things))]
    things = tuple(thing for layer in layers for thing in layer.picture.things)
    complete = all(layer.picture.complete or layer.is_cut_out for layer in layers)
    return PhotoClip(frames, owner, garments, things, complete, frozenset(known), tuple(mistaken))


def _lay(
    layer: Layer,
    t: int,
    frame: NDArray[np.uint8],
    owner: NDArray[np.uint8],
    garments: NDArray[np.uint8],
) -> None:
    """Lay a layer over one frame, in place."""
    picture = layer.picture
    patch = _patch(layer, t, frame.shape)
    if patch is None:
        return
    there = patch.there
    pixels = _place(picture.image, patch, smooth=True)
    numbers = _place(picture.owner, patch, smooth=False)
    if not np.all(layer.gain == 1):
        pixels = _amplified(pixels, layer.gain)
    if layer.is_cut_out:
        weight = _edge(picture.owner, patch, layer.softness)
        if layer.shadow:
            _cast_shadow(frame, weight, there, layer.shadow)
        below = frame[there].astype(np.float32)
        frame[there] = below + (pixels - below) * weight[..., None] + np.float32(0.5)
        on_top = weight > _COVERED
    else:
        frame[there] = pixels
        on_top = np.ones(numbers.shape, bool)
    shown = np.where((numbers != 0) & (numbers != UNSURE), numbers + (layer.first - 1), numbers)
    if layer.is_cut_out:  # a blended edge may lie beside the cut-out's own pixels
        shown = np.where(numbers == 0, UNSURE, shown)
    owner[there][on_top] = shown[on_top]
    worn = np.zeros_like(numbers)
    if picture.garments is not None:
        worn = _place(picture.garments, patch, smooth=False)
    garments[there][on_top] = worn[on_top]


class _Patch(NamedTuple):
    """Where a picture lies in a frame: scaled to `size`, turned to the size `turned`; its part `box` covers `there`.

    Sizes are (width, height), the box is (left, top, right, bottom), `there` are rows and columns of the frame.
    """

    size: tuple[int, int]
    angle: float
    turned: tuple[int, int]
    box: tuple[int, int, int, int]
    there: tuple[slice, slice]


def _patch(layer: Layer, t: int, frame: Sequence[int]) -> _Patch | None:
    """The layer's place in a frame (height, width, ...); None where it lies outside."""
    x, y, share, angle = layer.path[t]
    tall, wide = layer.picture.owner.shape
    height = max(3, round(share * frame[0]))
    width = max(3, round(height * wide / tall))
    left, top = round(x * frame[1] - width / 2), round(y * frame[0] - height / 2)
    turned = _turned_size(width, height, angle) if angle else (width, height)
    left, top = left + (width - turned[0]) // 2, top + (height - turned[1]) // 2
    rows = slice(max(0, top), min(frame[0], top + turned[1]))
    columns = slice(max(0, left), min(frame[1], left + turned[0]))
    if columns.stop <= columns.start or rows.stop <= rows.start:
        return None
    box = (columns.start - left, rows.start - top, columns.stop - left, rows.stop - top)
    return _Patch((width, height), angle, turned, box, (rows, columns))


def _amplified(pixels: NDArray[np.uint8], gain: NDArray[np.float64]) -> NDArray[np.uint8]:
    table = np.clip(np.arange(256) * gain[:, None], 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).point(table.ravel().tolist()))


def _turned_size(width: int, height: int, angle: float) -> tuple[int, int]:
    cosine, sine = abs(np.cos(np.radians(angle))), abs(np.sin(np.radians(angle)))
    wide, tall = width * cosine + height * sine, width * sine + height * cosine
    return int(np.ceil(wide)), int(np.ceil(tall))


def _place(values: NDArray[np.uint8], patch: _Patch, smooth: bool) -> NDArray[np.uint8]:
    """The part of an image that is seen, scaled and turned."""
    resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    image = Image.fromarray(values)
    width, height = patch.size
    left, top, right, bottom = patch.box
    if not patch.angle:
        across, down = values.shape[1] / width, values.shape[0] / height
        region = (left * across, top * down, right * across, bottom * down)
        return np.asarray(image.resize((right - left, bottom - top), resampling, region))
    cosine, sine = np.cos(np.radians(patch.angle)), np.sin(np.radians(patch.angle))
    x, y = left - patch.turned[0] / 2, top - patch.turned[1] / 2
    to_x, to_y = cosine * x + sine * y + width / 2, -sine * x + cosine * y + height / 2
    matrix = (cosine, sine, to_x, -sine, cosine, to_y)
    scaled, size = image.resize(patch.size, resampling), (right - left, bottom - top)
    return np.asarray(scaled.transform(size, Image.Transform.AFFINE, matrix, resampling))


def _edge(owner: NDArray[np.uint8], patch: _Patch, softness: float) -> NDArray[np.float32]:
    """The share of each pixel that the cut-out covers, 0..1."""
    mask = (owner != 0).astype(np.uint8) * 255
    placed = Image.fromarray(_place(mask, patch, smooth=True))
    if softness:
        placed = placed.filter(ImageFilter.GaussianBlur(softness))
    return np.asarray(placed, np.float32) / np.float32(255)


def _cast_shadow(
    frame: NDArray[np.uint8],
    weight: NDArray[np.float32],
    there: tuple[slice, slice],
    darkness: float,
) -> None:
    """Darken the frame, in place, a little below and beside what is laid over it."""
    height, width = frame.shape[:2]
    small = (max(1, width // _SHADOW_SCALE), max(1, height // _SHADOW_SCALE))
    mask = np.zeros((height, width), np.uint8)
    mask[there] = weight * 255
    shade = Image.fromarray(mask).resize(small, Image.Resampling.BOX)
    reach = max(1, round(0.03 * small[1]))
    shade = shade.filter(ImageFilter.GaussianBlur(reach))
    moved = Image.fromarray(np.roll(np.asarray(shade), (reach, reach), (0, 1)))
    moved = moved.resize((width, height), Image.Resampling.BILINEAR)
    frame[:] = frame * (1 - darkness / 255 * np.asarray(moved, np.float32))[..., None]
