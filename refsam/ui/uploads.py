"""Uploads: files of a few formats, inside one folder, of limited size and length."""

from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

from refsam.errors import UserError
from refsam.images import IMAGE_SUFFIXES
from refsam.video import FrameSource, ReadOptions, open_source

# Formats that name other files (playlists, lists of clips, PostScript) are left out: a visitor could read our files with them.
_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,mjpeg"
_IMAGES = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "HEIF")


@dataclass(frozen=True)
class Limits:
    """Limits of one visitor.

    Attributes:
        megabytes: size of an uploaded file.
        frames: length of a clip.
        pixels: number in a frame.
        expressions: their number; characters: of each.
    """

    megabytes: int = 200
    frames: int = 1800
    pixels: int = 4096 * 2304
    expressions: int = 8
    characters: int = 500


def open_upload(path: Path, folder: Path, limits: Limits) -> FrameSource:
    """Open a file that a visitor has sent, after checking that it is harmless.

    Args:
        path: the file.
        folder: the only folder that may be read.
        limits: on size and length.

    Raises:
        UserError: it lies elsewhere, is no clip or image of a known format, or exceeds the limits; the message names the file
            without its folders.
    """
    try:
        _check_file(path, folder, limits)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            _check_image(path, limits)
        else:
            _check_video(path, limits)
        source = open_source(path, ReadOptions(max_pixels=limits.pixels))
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error
    expected = source.expected_frames or 0
    if expected > limits.frames:
        source.close()
        raise UserError(
            f"{path.name} has about {expected} frames, more than {limits.frames}: send a shorter clip"
            f" (or start with --max-frames {expected})"
        )
    return source


def read_expressions(text: str, limits: Limits) -> list[str]:
    """The expressions of a text that has one per line. Raises UserError: none, too many, or a long one."""
    expressions = [line.strip() for line in text.splitlines() if line.strip()]
    if not expressions:
        raise UserError("Say what to segment, one object per line, such as: the red car")
    if len(expressions) > limits.expressions:
        raise UserError(
            f"{len(expressions)} expressions: at most {limits.expressions} are taken at a time"
        )
    longest = max(map(len, expressions))
    if longest > limits.characters:
        raise UserError(
            f"an expression has {longest} characters: at most {limits.characters} are taken"
        )
    return expressions


def _check_file(path: Path, folder: Path, limits: Limits) -> None:
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise UserError(f"{path.name} was not uploaded here: send the file itself")
    megabytes = path.stat().st_size / 1e6
    if megabytes > limits.megabytes:
        raise UserError(
            f"{path.name} has {megabytes:.0f} MB, more than {limits.megabytes}: send a smaller file"
            f" (or start with --max-megabytes {megabytes:.0f})"
        )


def _check_image(path: Path, limits: Limits) -> None:
    Image.init()
    # Not every pillow reads AVIF and HEIF.
    readable = [name for name in _IMAGES if name in Image.OPEN]
    try:
        with Image.open(path, formats=readable) as image:
            _check_pixels(path.name, image.width, image.height, limits)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path.name} is not an image that can be read here: send a JPEG, PNG, WebP, BMP or TIFF file"
        ) from error


def _check_video(path: Path, limits: Limits) -> None:
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(str(path), options=options, metadata_errors="replace") as container:
            for stream in container.streams.video:
                _check_pixels(path.name, stream.width or 0, stream.height or 0, limits)
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path.name} is not a video that can be read here: send an MP4, WebM, MOV, MKV, AVI or GIF file, or an image"
        ) from error


def _check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise UserError(
            f"{name} has frames of {width} x {height}: at most {limits.pixels / 1e6:.1f} million pixels are taken"
        )
