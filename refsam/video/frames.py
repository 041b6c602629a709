"""Frames, their sources, the choice of frames, and errors of reading."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self

import numpy as np
from PIL import Image

from refsam.errors import UserError


class FrameDecodeError(UserError):
    """A frame in mid-stream that cannot be decoded; the frames before it are good."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as a viewer shows it: rotated, mirrored, transparency on white; pixels keep their shape.

    Attributes:
        index: number of the frame in the source, from 0; there are gaps where frames were left out.
        time: seconds since the source's first frame.
        image: ``(H, W, 3)`` uint8 RGB, at the stored size.
        aspect: width of a pixel by its height; 1 for square pixels.
    """

    index: int
    time: float
    image: np.ndarray
    aspect: Fraction = Fraction(1)

    def square_image(self) -> np.ndarray:
        """The image resized to square pixels: ``(H', W', 3)`` uint8, one side enlarged."""
        if self.aspect == 1:
            return self.image
        height, width = self.image.shape[:2]
        if self.aspect > 1:
            width = round(width * self.aspect)
        else:
            height = round(height / self.aspect)
        return np.asarray(Image.fromarray(self.image).resize((width, height)))


@dataclass(frozen=True)
class ReadOptions:
    """Range of frames to read, and time limits.

    Attributes:
        start, end: seconds since the source's first frame; frames with ``start <= time < end`` are taken.
        stride: take every n-th of them.
        max_frames: read at most this many.
        after: number of the last frame of an earlier run; reading starts after it.
        timeout: seconds without a byte after which a stream is given up; 0 waits forever, as cameras always do.
        max_pixels: largest frame in pixels; None: the decoder's limit.
        skip_bad_frames: continue after a frame that cannot be decoded, and list it in ``skipped``.
    """

    start: float = 0.0
    end: float | None = None
    stride: int = 1
    max_frames: int | None = None
    after: int = -1
    timeout: float = 30.0
    max_pixels: int | None = None
    skip_bad_frames: bool = False

    def expected(self, frames: int | None, fps: Fraction) -> int | None:
        """Number of chosen frames out of that many, if their times are even."""
        if frames is None:
            return self.max_frames
        first = min(frames, -int(-self.start * fps // 1))
        last = frames if self.end is None else min(frames, -int(-self.end * fps // 1))
        count = -(-max(0, last - first) // self.stride)
        return count if self.max_frames is None else min(count, self.max_frames)

    def selection(self) -> dict[str, float | int | None]:
        """The options that select frames, for ``result.json``; empty if every frame is read."""
        chosen = {name: getattr(self, name) for name in ("start", "end", "stride", "max_frames")}
        return {name: v for name, v in chosen.items() if v != getattr(EVERYTHING, name)}

    def check_size(self, name: str, height: int, width: int) -> None:
        """Refuse a frame of too many pixels.

        Raises:
            UserError: more than `max_pixels`.
        """
        if self.max_pixels is not None and height * width > self.max_pixels:
            raise UserError(
                f"{name} has frames of {width} x {height}: at most {self.max_pixels / 1e6:.1f} million pixels are taken"
            )


EVERYTHING = ReadOptions()


class Choice:
    """Decides frame by frame which ones the options select."""

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self._in_range = 0
        self.taken = 0

    def has_ended(self, time: float = 0.0) -> bool:
        """Whether no frame of that time or later is wanted."""
        options = self._options
        if options.max_frames is not None and self.taken >= options.max_frames:
            return True
        return options.end is not None and time >= options.end

    def takes(self, index: int, time: float) -> bool:
        """Whether the next frame, with that number and time, is wanted; frames of an earlier run count as taken."""
        if time < self._options.start:
            return False
        self._in_range += 1
        if (self._in_range - 1) % self._options.stride:
            return False
        self.taken += 1
        return index > self._options.after


@dataclass
class FrameSource(ABC):
    """An open source of frames: iterate over it once; close it or use it in ``with``.

    Attributes:
        name: where the frames come from, for messages and results.
        fps: mean frames per second.
        time_base: unit in which every frame time of the source is a whole number.
        expected_frames: number of frames to come, None if unknown.
        notes: problems of the source in words; more may be added while it is read.
        skipped: the frames that could not be decoded, by number, and why.
        files: the files of a folder's frames, by number; None for other sources.
        sound: file whose sound belongs to the frames, and the seconds in it at which they begin; None if there is none.
    """

    name: str
    fps: Fraction = Fraction(24)
    time_base: Fraction = Fraction(1, 24)
    expected_frames: int | None = None
    notes: list[str] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    files: list[str] | None = None
    sound: tuple[str, float] | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """The frames, in the order and at the times at which a viewer shows them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027, a folder of images keeps nothing open
        """Close the source."""

    def note(self, text: str) -> None:
        """Note something once."""
        if text not in self.notes:
            self.notes.append(text)


def source_facts(source: FrameSource) -> dict[str, Any]:
    """Entries of ``result.json`` about a source that was read."""
    skipped = [{"frame": frame, "problem": words} for frame, words in source.skipped.items()]
    facts: dict[str, Any] = {"notes": source.notes, "skipped_frames": skipped}
    return facts if source.files is None else facts | {"files": source.files}


def reason(error: BaseException) -> str:
    """An error's text; FFmpeg's without the location, which the message already names."""
    words = getattr(error, "strerror", None) or str(error)
    return str(words) or type(error).__name__
