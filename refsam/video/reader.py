"""Open sources of frames: video files, folders and patterns of images, single images, cameras, streams, pipes."""

import glob
import os
import re
import stat
import sys
from pathlib import Path

from refsam.errors import UserError
from refsam.images import IMAGE_SUFFIXES, images_in, natural_key
from refsam.video.byte_stream import open_stream
from refsam.video.frames import EVERYTHING, FrameSource, ReadOptions
from refsam.video.images import ImageSource, open_image
from refsam.video.video_source import VideoSource

_CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
_WANTED = "give a video, an image or a folder of images"
_NUMBER = re.compile(r"%0?\d*d")


def open_source(source: str | os.PathLike[str], options: ReadOptions = EVERYTHING) -> FrameSource:
    """Open a video file, a folder of images, an image, a camera, a network stream or a pipe.

    Args:
        source: path; ``-`` for standard input; ``frames/*.jpg`` or ``frames/%05d.jpg`` for images; ``camera:0`` (or
            ``camera:/dev/video0``) for a camera; a URL such as ``rtsp://...`` for a stream. Images are taken in
            natural order (``frame2`` before ``frame10``); hidden and other files of a folder are left out.
        options: range of frames and time limits.

    Raises:
        UserError: the source is missing, empty, unreadable, silent or holds no frames.
    """
    name = os.fspath(source)
    if not name.strip():
        raise UserError(f"the source is empty: {_WANTED}")
    if name.startswith("camera:"):
        return _open_camera(name.removeprefix("camera:"), options)
    if name == "-" and stat.S_ISREG(os.fstat(0).st_mode):
        return VideoSource("/dev/stdin", name="standard input", options=options)
    if "://" in name and not os.path.lexists(name):
        return VideoSource(name, options=options)
    if is_pattern(name):
        return _open_pattern(name, options)
    return _open_path(name, options)


def is_pattern(name: str) -> bool:
    """Whether the name is a pattern of files, and no file has that name."""
    is_there = "://" in name or os.path.lexists(name)
    return not is_there and (bool(_NUMBER.search(name)) or glob.has_magic(name))


def matching(pattern: str) -> list[str]:
    """The files that a pattern with ``*``, ``?``, ``[...]`` or ``%05d`` matches, in natural order."""
    if number := _NUMBER.search(Path(pattern).name):
        folder = Path(pattern).parent
        before, after = Path(pattern).name[: number.start()], Path(pattern).name[number.end() :]
        wanted = re.compile(re.escape(before) + r"\d+" + re.escape(after))
        names = [path for path in folder.glob("*") if wanted.fullmatch(path.name)]
        return sorted(map(str, names), key=natural_key)
    return sorted(glob.glob(pattern), key=natural_key)


def _open_pattern(pattern: str, options: ReadOptions) -> FrameSource:
    found = matching(pattern)
    if not found:
        raise UserError(f"{pattern} matches no file: {_WANTED}")
    if len(found) == 1:
        return _open_path(found[0], options)
    others = [path for path in found if Path(path).suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        raise UserError(
            f"{pattern} matches {len(found)} files, and {others[0]} is no image: give one video, or refsam segment-videos"
        )
    return ImageSource([Path(path) for path in found], pattern, options)


def _open_path(name: str, options: ReadOptions) -> FrameSource:
    path = Path(name)
    try:
        if path.is_dir():
            paths = images_in(path)
            if not paths:
                raise UserError(
                    f"{name} holds no images: give a folder of jpg, png, webp, bmp or tif files"
                )
            return ImageSource(paths, name, options)
        stream = open_stream(name, options.timeout)
        if stream is not None:
            return VideoSource(stream, options=options)
        if path.stat().st_size == 0 and path.is_file():
            raise UserError(f"{name} is empty (0 bytes): {_WANTED}")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: {_WANTED}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name} cannot be read ({what}): give a readable path") from error
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return open_image(path, name, options)
    return VideoSource(name, options=options)


def _open_camera(device: str, options: ReadOptions) -> VideoSource:
    container_format = _CAMERA_FORMATS.get(sys.platform)
    if device.isdigit() and container_format == "v4l2":
        device = f"/dev/video{device}"
    return VideoSource(device, container_format, f"camera {device}", options, is_live=True)
