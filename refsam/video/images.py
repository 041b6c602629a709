"""Images on disk as frames: one, a folder of them, or the pictures of an animation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from refsam.errors import UserError
from refsam.images import IMAGE_ERRORS, refuse_image, to_rgb
from refsam.video.frames import (
    EVERYTHING,
    Choice,
    Frame,
    FrameDecodeError,
    FrameSource,
    ReadOptions,
)

IMAGE_FPS = Fraction(24)  # images carry no rate; DAVIS, the usual folder of frames, has 24
_MILLISECOND = Fraction(1, 1000)
_REDUCED = 254  # TIFF's tag of a page that is a smaller copy of another
# JPEGs with a second picture inside hold a preview or another eye's view, not another moment.
_ONE_PICTURE = frozenset({"JPEG", "MPO"})


class ImageSource(FrameSource):
    """Image files as a sequence of frames at 24 per second.

    Args:
        paths: the images, in order.
        name: what messages and results call them.
        options: which images to read.
    """

    def __init__(self, paths: list[Path], name: str, options: ReadOptions) -> None:
        expected = options.expected(len(paths), IMAGE_FPS)
        super().__init__(name, IMAGE_FPS, 1 / IMAGE_FPS, expected, files=[p.name for p in paths])
        self._paths, self._options = paths, options

    def __iter__(self) -> Iterator[Frame]:
        choice = Choice(self._options)
        for index, path in enumerate(self._paths):
            time = float(index / self.fps)
            if choice.has_ended(time):
                return
            if not choice.takes(index, time):
                continue
            try:
                image = read_image(path, self._options)
            except UserError as error:
                if self._options.skip_bad_frames:
                    self.skipped[index] = str(error)
                    continue
                if choice.taken == 1:
                    raise
                raise FrameDecodeError(f"frame {index}: {error}") from error
            yield Frame(index, time, image)


class AnimationSource(FrameSource):
    """The pictures of an animated WebP, PNG or AVIF, each for its own time, or the pages of a TIFF at 24 per second.

    Args:
        path: the file.
        pages: which of its pictures.
        options: which of those to read.
        name: what messages and results call it.
    """

    def __init__(self, path: Path, pages: list[int], options: ReadOptions, name: str) -> None:
        super().__init__(name, time_base=_MILLISECOND)
        self._path, self._pages, self._options = path, pages, options
        with _opened(path) as image:
            image.seek(pages[0])
            image.load()
            self.fps = (1 / _duration(image)).limit_denominator(1001)
        self.expected_frames = options.expected(len(pages), self.fps)

    def __iter__(self) -> Iterator[Frame]:
        choice, time = Choice(self._options), Fraction(0)
        with _opened(self._path) as opened:
            for index, page in enumerate(self._pages):
                if choice.has_ended(float(time)):
                    return
                is_wanted = choice.takes(index, float(time))
                try:
                    with _errors(self._path):
                        opened.seek(page)
                        opened.load()  # only then its duration is known
                        image = _pixels(opened, self._path, self._options) if is_wanted else None
                except UserError as error:  # later pictures build on it, so reading cannot continue
                    if choice.taken <= 1:
                        raise
                    raise FrameDecodeError(f"frame {index}: {error}") from error
                if image is not None:
                    yield Frame(index, float(time), image)
                time += _duration(opened)


def open_image(path: Path, name: str, options: ReadOptions) -> ImageSource | AnimationSource:
    """One image file as a source: all of its pictures if it is an animation. Raises UserError: it cannot be read."""
    with _opened(path) as opened:
        pages = _pages(opened)
    if len(pages) > 1:
        return AnimationSource(path, pages, options, name)
    return ImageSource([path], name, options)


def read_image(path: str | os.PathLike[str], options: ReadOptions = EVERYTHING) -> np.ndarray:
    """Read an image as ``(H, W, 3)`` uint8 RGB: EXIF orientation applied, transparency on white.

    Palette, grey, 1-bit and 16-bit images are converted (16 bits keep their upper 8).

    Raises:
        UserError: missing, unreadable, damaged, of floating-point pixels, or an animation.
    """
    with _opened(path) as opened:
        pages = _pages(opened)
        if len(pages) > 1:
            raise UserError(
                f"{path} holds {len(pages)} pictures: give it alone, or a folder of images of one picture"
            )
        return _pixels(opened, path, options)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    with _errors(path), Image.open(path) as opened:
        yield opened


@contextmanager
def _errors(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except IMAGE_ERRORS as error:
        refuse_image(path, error)


def _pixels(opened: Image.Image, path: str | os.PathLike[str], options: ReadOptions) -> np.ndarray:
    options.check_size(str(path), opened.height, opened.width)
    return np.asarray(to_rgb(ImageOps.exif_transpose(opened), path))


def _pages(opened: Image.Image) -> list[int]:
    """Indices of a file's animation frames, without smaller copies, previews and fallback pictures."""
    count = 1 if opened.format in _ONE_PICTURE else getattr(opened, "n_frames", 1)
    if opened.format == "TIFF" and count > 1:
        whole = [page for page in range(count) if not _is_reduced(opened, page)]
        opened.seek(0)
        return whole or [0]
    return list(range(1 if opened.info.get("default_image") and count > 1 else 0, count))


def _is_reduced(opened: Image.Image, page: int) -> bool:
    opened.seek(page)
    return bool(opened.tag_v2.get(_REDUCED, 0) & 1)  # type: ignore[attr-defined]


def _duration(opened: Image.Image) -> Fraction:
    """Seconds that a loaded picture is shown; 0 in an animation means a tenth of a second, as in browsers."""
    if opened.format == "TIFF":
        return 1 / IMAGE_FPS
    return Fraction(opened.info.get("duration") or 100) / 1000
