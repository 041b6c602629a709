"""Draw masks, contours and captions onto frames."""

import colorsys
from collections.abc import Sequence

import numpy as np

from refsam.video.captions import draw_captions

# Far apart in hue and in lightness; after these, hues by the golden ratio never repeat closely.
_PALETTE = (
    (255, 82, 82),
    (64, 156, 255),
    (255, 202, 40),
    (74, 222, 128),
    (217, 90, 255),
    (255, 145, 40),
    (45, 212, 224),
    (255, 122, 190),
)


def expression_colour(index: int) -> tuple[int, int, int]:
    """Colour (RGB, 0..255) of the expression with that index, the same in every frame and video."""
    if index < len(_PALETTE):
        return _PALETTE[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.9, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_overlay(
    image: np.ndarray, masks: np.ndarray, captions: Sequence[str] | None = None
) -> np.ndarray:
    """Tint and outline each mask in its expression's colour and list the captions at the top left.

    Args:
        image: ``(H, W, 3)`` uint8 RGB; left as it is.
        masks: ``(E, H, W)`` bool; the later one lies on top where they overlap.
        captions: one line per expression; None draws none. The caption of an empty mask is dimmed.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if masks.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"masks: got shape {masks.shape}, want (E, {image.shape[0]}, {image.shape[1]})"
        )
    if captions is not None and len(captions) != len(masks):
        raise ValueError(f"captions: got {len(captions)}, want {len(masks)}, one per mask")
    canvas = image.copy()
    thickness = max(1, round(min(image.shape[:2]) / 250))
    boxes = [bounding_box(mask, thickness) for mask in masks]
    for index, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        if box is not None:
            _draw_mask(canvas[box], mask[box], expression_colour(index), thickness)
    if captions is not None:
        colours = map(expression_colour, range(len(captions)))
        draw_captions(canvas, captions, colours, [box is not None for box in boxes])
    return canvas


def bounding_box(mask: np.ndarray, margin: int) -> tuple[slice, slice] | None:
    """Rows and columns that a mask ``(H, W)`` bool takes up, with a margin that may reach beyond the right and lower edge."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return (
        slice(max(0, top - margin), bottom + margin),
        slice(max(0, int(columns[0]) - margin), int(columns[-1]) + 1 + margin),
    )


def _draw_mask(
    canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], thickness: int
) -> None:
    height, width = mask.shape
    # Rows of 3 * width bytes, uint8 throughout: an order of magnitude faster than floats and (H, W, 3) masks.
    inside = np.repeat(-mask.view(np.uint8), 3, axis=1)
    tint = np.tile(np.array(colour, np.uint8), width)
    flat = canvas.reshape(height, 3 * width)
    # 9/16 of the picture and 7/16 of the colour.
    tinted = (flat >> 1) + (flat >> 4) + ((tint >> 1) - (tint >> 4))
    flat += (tinted - flat) & inside
    canvas[...] = flat.reshape(canvas.shape)  # the box is a view with gaps, so reshaping copied it
    canvas[mask & ~_erode(mask, thickness)] = colour


def _erode(mask: np.ndarray, steps: int) -> np.ndarray:
    """Pixels whose four neighbours within ``steps`` are inside; pixels beyond the edge count as inside."""
    inner = mask
    for _ in range(steps):
        smaller = inner.copy()
        smaller[1:] &= inner[:-1]
        smaller[:-1] &= inner[1:]
        smaller[:, 1:] &= inner[:, :-1]
        smaller[:, :-1] &= inner[:, 1:]
        inner = smaller
    return inner
