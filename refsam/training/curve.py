"""A run's learning curve as a picture: the loss of training, and the score of validation where there is one."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

_SIZE = (900, 420)
_MARGINS = (60, 30, 20, 40)  # left, top, right, bottom
_COLOURS = {"total": (31, 119, 180), "J&F": (214, 39, 40)}
_NAMES = {"total": "loss (training)", "J&F": "J&F (validation)"}
_GREY = (120, 120, 120)

Points = list[tuple[float, float]]


def draw_curve(log: Path, path: Path) -> None:
    """Draw `log.jsonl` into a PNG, each curve over its own range, whose ends are written beside it."""
    curves = _read(log)
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = (
        _MARGINS[0],
        _MARGINS[1],
        _SIZE[0] - _MARGINS[2],
        _SIZE[1] - _MARGINS[3],
    )
    draw.rectangle((left, top, right, bottom), outline=_GREY)
    last = max((x for points in curves.values() for x, _ in points), default=1.0)
    draw.text((left, bottom + 8), "step 0", fill=_GREY)
    draw.text((right - 60, bottom + 8), f"step {last:.0f}", fill=_GREY)
    for row, (name, points) in enumerate(curves.items()):
        if not points:
            continue
        low, high = min(y for _, y in points), max(y for _, y in points)
        height = (bottom - top) / ((high - low) or 1.0)
        line = [(left + (right - left) * x / last, bottom - height * (y - low)) for x, y in points]
        _draw_line(draw, line, _COLOURS[name])
        text = f"{_NAMES[name]}: from {points[0][1]:.3g} to {points[-1][1]:.3g}, range {low:.3g} to {high:.3g}"
        draw.text((left + 8, top + 6 + 16 * row), text, fill=_COLOURS[name])
    image.save(path)


def _draw_line(
    draw: ImageDraw.ImageDraw, line: Sequence[tuple[float, float]], colour: tuple[int, int, int]
) -> None:
    if len(line) > 1:
        draw.line(line, fill=colour, width=2)
    for x, y in line if len(line) < 40 else []:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def _read(log: Path) -> dict[str, Points]:
    curves: dict[str, Points] = {name: [] for name in _COLOURS}
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, points in curves.items():
            if name in record:
                points.append((record["step"], record[name]))
    return curves
