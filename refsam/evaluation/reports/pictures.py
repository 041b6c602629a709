"""Pictures for reports: curves over time as SVG, and masks against the truth drawn onto frames as JPEG."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from refsam.errors import UserError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#4d4d4d")
# Blue where prediction and truth agree, orange what was missed, magenta what is marked wrongly: told apart by
# readers who do not see red and green as different.
_AGREED, _MISSED, _WRONG = (0, 114, 178), (230, 159, 0), (204, 0, 153)
LEGEND = "blue: right, orange: missed, magenta: marked wrongly"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 620, 200, 38, 32, 10
_TILE_WIDTH = 300
_MOST_LABELS = 8


@dataclass(frozen=True)
class Curve:
    """One line of a chart: `values` `(T,)` in 0..1."""

    label: str
    values: NDArray[np.float64]
    colour: str
    dashed: bool = False


def chart(curves: Sequence[Curve], frames: Sequence[str]) -> bytes:
    """An SVG of curves in 0..1 over the frames, with a legend where there are few of them."""
    shown = curves if len(curves) <= _MOST_LABELS else ()
    height = _HEIGHT + 17 * ((len(shown) + 1) // 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        *(_grid_line(level) for level in (0, 0.25, 0.5, 0.75, 1)),
        *(_line(curve) for curve in curves),
        _label(_LEFT, _HEIGHT - 14, frames[0]),
        _label(_WIDTH - 8, _HEIGHT - 14, frames[-1], "end"),
    ]
    for index, curve in enumerate(shown):
        left, top = _LEFT + 290 * (index % 2), _HEIGHT + 17 * (index // 2)
        parts.append(_stroke(curve, f"{left},{top - 4} {left + 22},{top - 4}"))
        parts.append(_label(left + 28, top, curve.label[:44]))
    return "\n".join([*parts, "</svg>"]).encode()


def _grid_line(level: float) -> str:
    y = _y(level)
    line = f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 8}" y2="{y:.1f}" stroke="#dde1e6"/>'
    return line + _label(_LEFT - 5, y + 4, f"{level:.2f}", "end")


def _line(curve: Curve) -> str:
    width = _WIDTH - 8 - _LEFT
    last = max(1, len(curve.values) - 1)
    points = " ".join(
        f"{_LEFT + width * index / last:.1f},{_y(value):.1f}"
        for index, value in enumerate(curve.values)
    )
    if len(curve.values) == 1:
        return f'<circle cx="{_LEFT}" cy="{_y(curve.values[0]):.1f}" r="3" fill="{curve.colour}"/>'
    return _stroke(curve, points)


def _stroke(curve: Curve, points: str) -> str:
    dashes = ' stroke-dasharray="4 3"' if curve.dashed else ""
    return f'<polyline points="{points}" fill="none" stroke="{curve.colour}" stroke-width="2"{dashes}/>'


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}" fill="#444">{html.escape(text)}</text>'
    )


def _y(value: float) -> float:
    return _TOP + (1 - value) * (_HEIGHT - _TOP - _BOTTOM)


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
        grey = canvas[region].mean(
            axis=1, keepdims=True
        )  # so that the object's colour does not blend with the tint
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
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=82)
    return content.getvalue()
