"""Image files: the images of a folder, their order and their pixels; one reader for training, evaluation and segmentation."""

import io
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageOps

from refsam.errors import UserError

with suppress(ImportError):  # phones' photographs, which Pillow does not read by itself
    from pi_heif import register_heif_opener

    register_heif_opener()

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .bmp .tif .tiff .webp .ppm .pgm .pbm .jp2 .avif .heic .heif .hif".split()
)
# A file that is cut off, damaged, not an image or extremely large can raise any error in the reader of its format.
IMAGE_ERRORS = Exception
# Orientations in which a viewer shows the stored rows as columns.
_TURNED = (5, 6, 7, 8)


class ImageError(UserError):
    """A file that is missing, damaged or not an image; `problem` is the end of a message that begins with its path."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.problem = problem


def images_in(folder: Path) -> list[Path]:
    """The images of a folder in natural order (`frame2` before `frame10`), hidden and other files left out.

    A broken link is one of them: reading it is an error, whereas leaving it out would shift the numbers of those after it.
    """
    paths = (
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and (path.is_file() or not path.exists())
    )
    return sorted(paths, key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Digits compare as numbers and before letters; where these are equal, as in 1.jpg and 01.jpg, the plain name decides."""
    parts = ((part.isdecimal(), part) for part in re.findall(r"\d+|\D+", name))
    keys = [(not digits, int(part) if digits else 0, part.casefold()) for digits, part in parts]
    return keys, name


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) as a viewer shows the image; raises ImageError."""
    try:
        with Image.open(path) as image:
            return _shown(image, (image.height, image.width))
    except IMAGE_ERRORS as error:
        refuse_image(path, error)


def read_image(
    path: str | os.PathLike[str],
    wanted: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """An image as a viewer shows it, RGB of 8 bits, and its whole (height, width); raises ImageError.

    EXIF's orientation is applied, transparency is drawn on white, of 16 bits the upper 8 are kept. `wanted` returns, for the
    whole size, the least that is needed: a JPEG may then have a half, a quarter or an eighth of it, which is faster to decode.
    """
    try:
        with Image.open(path) as image:
            size = _shown(image, (image.height, image.width))
            if wanted is not None:
                height, width = _shown(image, wanted(size))
                image.draft("RGB", (width, height))
            return to_rgb(ImageOps.exif_transpose(image), path), size
    except IMAGE_ERRORS as error:
        refuse_image(path, error)


def encode_jpeg(image: Image.Image | np.ndarray) -> bytes:
    """An image, or pixels (H, W, 3) uint8 RGB, as JPEG."""
    content = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


def _shown(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """The shown size for a stored one, or the stored size for a shown one."""
    is_turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    return (size[1], size[0]) if is_turned else size


def to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """An image of any mode as RGB of 8 bits, transparency on white; raises ImageError for floating-point pixels."""
    if image.mode == "F":
        raise ImageError(path, "has floating-point pixels: give 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        wide = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(wide.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return Image.fromarray(on_white(np.asarray(image.convert("RGBA"))))
    return image.convert("RGB")


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 4) uint8 RGBA over white, (H, W, 3) uint8 RGB."""
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(colour)
    blended = colour.astype(np.uint16) * alpha + np.uint16(255) * (255 - alpha)
    return ((blended + 127) // 255).astype(np.uint8)


def refuse_image(path: str | os.PathLike[str], error: Exception) -> NoReturn:
    """Raise Pillow's error about a file as ImageError."""
    if isinstance(error, ImageError):
        raise error
    if isinstance(error, FileNotFoundError):
        raise ImageError(path, "does not exist: give an image") from None
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    problem = f"cannot be read as an image ({reason}): give a complete image"
    raise ImageError(path, problem) from error
