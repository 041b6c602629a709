"""Captions in the overlay's corner, in a font that has their letters."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

_BACKGROUND = (24, 24, 28)
_PROBE = 20  # points; the size does not matter to whether a letter is there
# A private character: a font draws the same sign for it as for every letter that it lacks.
_UNKNOWN = "\ue000"
_FONT_FOLDERS = {
    "win32": ("C:/Windows/Fonts",),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
}.get(
    sys.platform, ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
)


def caption(text: str, score: float, visible: bool, number: int = 0) -> str:
    """The caption of one expression in one frame: its text and score (0..1), or that its object is not in view.

    Any white space becomes one space. If no font has its letters, the expression's number is shown.
    """
    text = _printable(text, number)
    return f"{text}   {score:.2f}" if visible else f"{text}   not in view"


def draw_captions(
    canvas: np.ndarray, captions: Sequence[str], colours: Iterable[Colour], visible: Sequence[bool]
) -> None:
    """Draw as many captions as fit at the top left of ``(H, W, 3)`` uint8; those of invisible objects are dimmed."""
    height, width = canvas.shape[:2]
    size = max(10, round(min(height, width) / 28))
    margin = size // 2
    top = margin
    for text, colour, bright in zip(captions, colours, visible, strict=False):
        label = _label(text, colour, bright, size, width - 2 * margin)
        if label is None or top + len(label) > height:
            return
        area = canvas[top : top + len(label), margin : margin + label.shape[1]]
        # Three quarters label and one quarter picture, which stays visible behind it.
        area[:] = (area >> 2) + label
        top += len(label) + margin // 2


@lru_cache(maxsize=64)
def _label(text: str, colour: Colour, bright: bool, size: int, max_width: int) -> np.ndarray | None:
    """Three quarters of a caption's brightness, ``(h, w, 3)`` uint8; None where there is no room."""
    font = _font_with(frozenset(text), size) or ImageFont.load_default(size)
    padding, swatch = size // 2, size // 2
    room = max_width - 3 * padding - swatch
    if room < size:
        return None
    text = _shorten(text, font, room)
    width = round(font.getlength(text)) + 3 * padding + swatch
    label = Image.new("RGB", (width, 2 * size), _BACKGROUND)
    draw = ImageDraw.Draw(label)
    dim = 1.0 if bright else 0.5
    fill = tuple(round(dim * value) for value in colour)
    top = size - swatch // 2
    draw.rectangle((padding, top, padding + swatch - 1, top + swatch - 1), fill=fill)
    ink = (255, 255, 255) if bright else (150, 150, 150)
    draw.text((2 * padding + swatch, size), text, font=font, fill=ink, anchor="lm")
    pixels = np.asarray(label)
    return (pixels >> 1) + (pixels >> 2)


def _shorten(text: str, font: Font, room: int) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


@lru_cache(maxsize=64)
def _printable(text: str, number: int) -> str:
    text = " ".join(text.split())
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return text if _font_with(frozenset(text), _PROBE) is not None else f"expression {number}"


@lru_cache(maxsize=64)
def _font_with(letters: frozenset[str], size: int) -> Font | None:
    """The built-in font if it has all letters, else the first installed one that has; None if none does."""
    default = ImageFont.load_default(size)
    if _has(default, letters):
        return default
    for path in _installed():
        try:
            font = ImageFont.truetype(str(path), size)
        except OSError:
            continue
        if _has(font, letters):
            return font
    return None


@lru_cache(maxsize=1)
def _installed() -> tuple[Path, ...]:
    """Files of the fonts that the system and the user installed."""
    files = (path for place in _FONT_FOLDERS for path in Path(place).expanduser().rglob("*"))
    return tuple(sorted(path for path in files if path.suffix.lower() in (".ttf", ".otf", ".ttc")))


def _has(font: Font, letters: frozenset[str]) -> bool:
    unknown = bytes(font.getmask(_UNKNOWN))
    return all(letter.isspace() or bytes(font.getmask(letter)) != unknown for letter in letters)
