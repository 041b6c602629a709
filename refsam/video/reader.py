"""Read frames from video files, folders of images, single images and cameras."""

import os
import queue
import re
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol, TypeVar

import av
import numpy as np

from refsam import images
from refsam.errors import UserError
from refsam.images import IMAGE_SUFFIXES
from refsam.runtime.threads import available_cores

IMAGE_FPS = Fraction(24)  # images carry no rate; DAVIS, the usual folder of frames, has 24
_FEW_CORES = 2
_CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}

Item = TypeVar("Item")


class FrameDecodeError(UserError):
    """A frame in mid-stream that cannot be decoded; the frames before it are good."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as a viewer shows it: rotation applied, transparency on white.

    Attributes:
        index: position in the source, from 0.
        time: seconds since the first frame.
        image: ``(H, W, 3)`` uint8 RGB.
    """

    index: int
    time: float
    image: np.ndarray


class FrameSource(Protocol):
    """What `open_source` returns: iterate over it once; close it or use it in ``with``.

    Attributes:
        name: where the frames come from, for messages and results.
        fps: mean frames per second.
        time_base: unit in which every frame time of the source is a whole number.
        expected_frames: number of frames that the source announces, None where it does not know.
    """

    name: str
    fps: Fraction
    time_base: Fraction
    expected_frames: int | None

    def __iter__(self) -> Iterator[Frame]: ...

    def __enter__(self) -> "FrameSource": ...

    def __exit__(self, *exc: object) -> None: ...

    def close(self) -> None: ...


def open_source(source: str | os.PathLike[str]) -> FrameSource:
    """Open a video file, a folder of images, an image, a camera or a network stream.

    Args:
        source: path; ``camera:0`` (or ``camera:/dev/video0``) for a camera; a URL such as
            ``rtsp://...`` for a stream. Images of a folder are taken in natural order
            (``frame2`` before ``frame10``); hidden and other files are left out.

    Raises:
        UserError: the source is missing, empty, unreadable or holds no frames.
    """
    name = os.fspath(source)
    if name.startswith("camera:"):
        return _open_camera(name.removeprefix("camera:"))
    if "://" in name:
        return VideoSource(name)
    path = Path(name)
    try:
        if path.is_dir():
            return ImageSource(_images_in(path), name)
        if path.stat().st_size == 0 and path.is_file():
            raise UserError(
                f"{name} is empty (0 bytes): give a video, an image or a folder of images"
            )
    except FileNotFoundError:
        raise UserError(
            f"{name} does not exist: give a video, an image or a folder of images"
        ) from None
    except OSError as error:
        raise UserError(
            f"{name} cannot be read ({error.strerror}): give a readable path"
        ) from error
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource([path], name)
    return VideoSource(name)


class ImageSource:
    """Images on disk as a sequence of frames at 24 per second.

    Args:
        paths: the images, in order.
        name: what messages and results call them.
    """

    def __init__(self, paths: list[Path], name: str) -> None:
        self.name = name
        self.fps = IMAGE_FPS
        self.time_base = 1 / IMAGE_FPS
        self.expected_frames: int | None = len(paths)
        self._paths = paths

    def __iter__(self) -> Iterator[Frame]:
        for index, path in enumerate(self._paths):
            try:
                image = read_image(path)
            except UserError as error:
                if index == 0:
                    raise
                raise FrameDecodeError(f"frame {index}: {error}") from error
            yield Frame(index, float(index / self.fps), image)

    def __enter__(self) -> "ImageSource":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is kept open between images."""


class VideoSource:
    """Frames of a video file, a network stream or a camera, decoded by FFmpeg.

    Args:
        location: path or URL.
        container_format: FFmpeg's name of the input format; None finds it out.
        name: what messages and results call it; the location by default.

    Raises:
        UserError: not a video, unreadable, or without a picture stream.
    """

    def __init__(self, location: str, container_format: str | None = None, name: str | None = None):
        self.name = name or location
        try:
            self._container = av.open(location, format=container_format, metadata_errors="replace")
        except (av.FFmpegError, ValueError) as error:
            raise UserError(
                f"{self.name} cannot be read as a video ({_reason(error)}):"
                " give a complete video file, an image or a folder of images"
            ) from error
        streams = [s for s in self._container.streams.video if not _is_no_video(s)]
        if not streams:
            self._container.close()
            raise UserError(
                f"{self.name} holds no video: give a video, an image or a folder of images"
            )
        self._stream = streams[0]
        # On few cores, threads for several frames at a time take from the rest what they gain.
        self._stream.thread_type = "AUTO" if available_cores() > _FEW_CORES else "SLICE"
        self.fps = self._stream.average_rate or self._stream.guessed_rate or IMAGE_FPS
        self.time_base = self._stream.time_base or 1 / self.fps
        self.expected_frames = self._expected_frames()

    def __iter__(self) -> Iterator[Frame]:
        frames, time, end = 0, 0.0, 0.0
        start: float | None = None
        try:
            for frame in self._container.decode(self._stream):
                if frame.is_corrupt:
                    raise _decode_error(self.name, frames, "the data is damaged")
                # A frame without a time, or one that runs backwards, follows where the last one ends.
                now = end if frame.time is None or start is None else frame.time - start
                time = now if now > time or frames == 0 else end
                start = frame.time if start is None else start
                end = time + _duration(frame, self.fps)
                yield Frame(frames, time, _to_rgb(frame))
                frames += 1
        except av.FFmpegError as error:
            raise _decode_error(self.name, frames, _reason(error)) from error
        if frames == 0 or self._is_cut_off(end):
            raise _decode_error(self.name, frames, "the file ends there")

    def __enter__(self) -> "VideoSource":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file or device."""
        self._container.close()

    def _expected_frames(self) -> int | None:
        if self._stream.frames:
            return self._stream.frames
        duration = self._container.duration  # microseconds
        return max(1, round(duration / 1e6 * self.fps)) if duration else None

    def _is_cut_off(self, end: float) -> bool:
        """Whether the file was truncated, which FFmpeg takes for its end; ``end`` is the last frame's."""
        kind, size = self._container.format.name, self._container.size
        if kind == "gif" and os.path.isfile(self._container.name):
            with open(self._container.name, "rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b";"
        if "mp4" in kind:
            return any(entry.pos + entry.size > size for entry in self._stream.index_entries)
        announced = _seconds(self._stream.metadata.get("DURATION", ""))  # Matroska's
        return end + 2 / float(self.fps) < announced


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image as ``(H, W, 3)`` uint8 RGB: EXIF orientation applied, transparency on white.

    Palette, grey, 1-bit and 16-bit images are converted (16 bits keep their upper 8).

    Raises:
        UserError: missing, truncated, not an image, or floating-point pixels.
    """
    return np.asarray(images.read_image(path)[0])


def prefetch(items: Iterable[Item], depth: int = 4) -> Generator[Item, None, None]:
    """Run an iterable in its own thread, at most ``depth`` items ahead.

    An exception of the iterable is raised here after the items before it. Closing the generator stops
    the thread and waits for it.
    """
    ahead: queue.Queue[tuple[str, object]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: object) -> None:
        while not stop.is_set():
            try:
                return ahead.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    return
            put("end", None)
        except BaseException as error:  # handed to the consumer, whatever it is
            put("error", error)

    thread = threading.Thread(target=work, name="refsam-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ahead.get()
            if kind == "end":
                return
            if kind == "error":
                raise value  # type: ignore[misc]
            yield value  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def _open_camera(device: str) -> VideoSource:
    container_format = _CAMERA_FORMATS.get(sys.platform)
    if device.isdigit() and container_format == "v4l2":
        device = f"/dev/video{device}"
    return VideoSource(device, container_format, name=f"camera {device}")


def _images_in(folder: Path) -> list[Path]:
    paths = images.images_in(folder)
    if not paths:
        raise UserError(
            f"{folder} holds no images: give a folder of jpg, png, webp, bmp or tif files"
        )
    return paths


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    has_alpha = any(component.is_alpha for component in frame.format.components)
    # A palette has its transparency in the colours, not in a component.
    if has_alpha or frame.format.has_palette:
        image = images.on_white(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _is_no_video(stream: av.VideoStream) -> bool:
    """Cover art of music, and text files that FFmpeg would draw as terminal art."""
    is_cover = bool(stream.disposition & av.stream.Disposition.attached_pic)
    return is_cover or stream.codec_context.name in ("ansi", "bintext", "xbin", "idf")


def _duration(frame: av.VideoFrame, fps: Fraction) -> float:
    if frame.duration and frame.time_base:
        return float(frame.duration * frame.time_base)
    return float(1 / fps)


def _seconds(clock: str) -> float:
    """Seconds of ``hh:mm:ss.fraction``; 0 for anything else."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", clock)
    if not match:
        return 0.0
    hours, minutes, seconds = (float(part) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _decode_error(name: str, index: int, reason: str) -> UserError:
    if index == 0:
        return UserError(
            f"{name} holds no frame that can be decoded ({reason}): give a complete video"
        )
    return FrameDecodeError(
        f"frame {index} of {name} cannot be decoded ({reason}): repair or re-encode the file"
    )


def _reason(error: BaseException) -> str:
    """FFmpeg's own words without the location, which the message already names."""
    return getattr(error, "strerror", None) or str(error)
