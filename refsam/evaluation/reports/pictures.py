"""Pictures for reports: masks against the truth drawn onto frames, as JPEG."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from refsam.errors import UserError
from refsam.images import encode_jpeg

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#4d4d4d")
# Blue where prediction and truth agree, orange what was missed, magenta what is marked wrongly: readers who
# cannot distinguish red from green can distinguish these.
_AGREED, _MISSED, _WRONG = (0, 114, 178), (230, 159, 0), (204, 0, 153)
LEGEND = "blue: right, orange: missed, magenta: marked wrongly"
_TILE_WIDTH = 300
T = TypeVar("T")


def best_and_worst(
    items: Iterable[T], score: Callable[[T], float], most: int
) -> list[tuple[str, T]]:
    """("best", item) for the highest scores, then ("worst", item) for the lowest: up to `most` of each, no item twice."""
    ranked = sorted(items, key=lambda item: -score(item))
    best = min(most, (len(ranked) + 1) // 2)
    worst = min(most, len(ranked) - best)
    return [("best", item) for item in ranked[:best]] + [
        ("worst", item) for item in ranked[len(ranked) - worst :]
    ]


def comparison(
    image: NDArray[np.uint8] | None, prediction: NDArray[np.bool_], truth: NDArray[np.bool_]
) -> Image.Image:
    """A prediction against the truth, both `(H, W)`, drawn onto a frame `(H, W, 3)` uint8 RGB, or onto grey without one.

    Raises UserError for a frame of another size.
    """
    if image is not None and image.shape[:2] != truth.shape:
        got, wanted = ("x".join(map(str, shape[1::-1])) for shape in (image.shape, truth.shape))
        raise UserError(f"frames: got a picture of {got}, want {wanted} as its masks have")
    canvas = np.full((*truth.shape, 3), 60, np.uint8) if image is None else image.copy()
    regions = ((prediction & truth, _AGREED), (~prediction & truth, _MISSED))
    for region, colour in (*regions, (prediction & ~truth, _WRONG)):
        # Tint a grey picture, so that the object's own colour does not mix with the tint.
        grey = canvas[region].mean(axis=1, keepdims=True)
        canvas[region] = (0.4 * grey + 0.6 * np.array(colour)).astype(np.uint8)
    height = max(1, round(truth.shape[0] * _TILE_WIDTH / truth.shape[1]))
    return Image.fromarray(canvas).resize((_TILE_WIDTH, height), Image.Resampling.BILINEAR)


def strip(tiles: Mapping[str, Image.Image]) -> bytes:
    """A JPEG of pictures side by side, each with its name above it."""
    height = max(tile.height for tile in tiles.values())
    sheet = Image.new("RGB", ((_TILE_WIDTH + 4) * len(tiles) - 4, height + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, tile) in enumerate(tiles.items()):
        left = (_TILE_WIDTH + 4) * index
        draw.text((left + 2, 2), name, fill=(60, 60, 60))
        sheet.paste(tile, (left, 16))
    return encode_jpeg(sheet)
