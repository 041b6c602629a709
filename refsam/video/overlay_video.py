"""The overlay as H.264 in MP4, at the source's times, with its sound."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from refsam.video.frames import Frame
from refsam.video.sound import SoundTrack

# A fraction of the time of veryfast at CRF 20, and no larger error (docs/performance.md).
H264_OPTIONS: dict[str, object] = {
    "preset": "ultrafast",
    "crf": "22",
    "x264-params": "cabac=1:no-deblock=0",
}
# Up to this many pixels x264 gets one thread: sharing so little costs a third more (docs/performance.md).
_PIXELS_OF_ONE_THREAD = 2**20
_FINEST_TIME_BASE = Fraction(1, 90000)
_LARGEST_SIDE = 16384  # x264 takes no more
_BT601, _LIMITED_RANGE = 6, 1  # how PyAV turns RGB into YUV; players would guess by the size


class OverlayVideo:
    """The file of the overlay; the first frame opens it and sets its size and pixel shape.

    Args:
        path: to write.
        fps: frame rate of the source.
        time_base: unit of the source's frame times.
        sound: file whose sound is kept, and the seconds in it at which the source's frames begin.
    """

    def __init__(
        self, path: Path, fps: Fraction, time_base: Fraction, sound: tuple[str, float] | None = None
    ) -> None:
        self._path = path
        self._fps = fps
        self._time_base = time_base if time_base.denominator <= 90000 else _FINEST_TIME_BASE
        self._source_of_sound = sound
        self._sound: SoundTrack | None = None
        self._container: av.container.OutputContainer | None = None
        self._first: float | None = None
        self._last = -1
        self._duration = float(1 / fps)
        self._to_yuv = VideoReformatter()

    @property
    def problem(self) -> str | None:
        """Why the sound could not be kept, in words; None if it was, or if there is none."""
        return None if self._sound is None else self._sound.problem

    def go_on(self, earlier: Path, first_time: float) -> None:
        """Start with the frames of an earlier run's overlay; `first_time` is the time of its first frame in the source."""
        with av.open(f"file:{earlier}") as old:
            stream = old.streams.video[0]
            aspect = stream.sample_aspect_ratio or Fraction(1)
            self._open((stream.height, stream.width), aspect, first_time)
            # The container takes packets as the encoder gives them and marks their ends in its own way.
            as_encoded = BitStreamFilterContext("h264_mp4toannexb", stream)
            for packet in old.demux(stream):
                for copy in as_encoded.filter(packet) if packet.size else ():
                    self._last = round(_time_of(copy) / self._time_base)
                    copy.stream = self._stream
                    self._mux(copy)

    def write(self, image: np.ndarray, frame: Frame) -> None:
        """Add a frame with its masks drawn onto it, ``(H, W, 3)`` uint8."""
        if self._container is None:
            self._open(_even(*image.shape[:2]), frame.aspect, frame.time)
        assert self._first is not None
        rgb = av.VideoFrame.from_numpy_buffer(self._fit(image), format="rgb24")
        # Two thirds of the encoder's own bilinear conversion's time, and the same error (docs/performance.md).
        picture = self._to_yuv.reformat(rgb, format="yuv420p", interpolation=Interpolation.POINT)
        earlier = self._last
        self._last = max(self._last + 1, round((frame.time - self._first) / self._time_base))
        if earlier >= 0:
            self._duration = float((self._last - earlier) * self._time_base)
        picture.pts, picture.time_base = self._last, self._time_base
        for packet in self._stream.encode(picture):
            self._mux(packet)

    def close(self) -> None:
        """Flush the encoder and write the index."""
        if self._container is None:
            return
        for packet in self._stream.encode(None):
            self._mux(packet)
        if self._sound is not None:
            self._sound.copy_until(float(self._last * self._time_base) + self._duration)
            self._sound.close()
        self._container.close()

    def abandon(self) -> None:
        """Close and ignore errors: the content will be removed."""
        try:
            self.close()
        except (OSError, av.FFmpegError):  # the full disk that made us give up
            return

    def _open(self, size: tuple[int, int], aspect: Fraction, first_time: float) -> None:
        self._size, self._first = size, first_time
        index_first = {"movflags": "+faststart"}
        self._container = av.open(str(self._path), "w", format="mp4", options=index_first)
        rate = self._fps.limit_denominator(1001)
        self._stream: Any = self._container.add_stream("libx264", rate=rate)
        self._stream.options = H264_OPTIONS
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.time_base = self._time_base
        if size[0] * size[1] <= _PIXELS_OF_ONE_THREAD:
            context.thread_count = 1
        context.colorspace, context.color_range = _BT601, _LIMITED_RANGE
        if aspect != 1:
            context.sample_aspect_ratio = aspect
        if self._source_of_sound is not None:
            path, begin = self._source_of_sound
            self._sound = SoundTrack(path, begin + first_time, self._container)

    def _fit(self, image: np.ndarray) -> np.ndarray:
        """The frame on the video's canvas: odd edges repeated, another size scaled to fit on black."""
        height, width = self._size
        if image.shape[:2] == self._size:
            return image
        rows, columns = height - image.shape[0], width - image.shape[1]
        if rows in (0, 1) and columns in (0, 1):
            return np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge")
        scale = min(height / image.shape[0], width / image.shape[1])
        size = max(1, int(image.shape[1] * scale)), max(1, int(image.shape[0] * scale))
        canvas, corner = Image.new("RGB", (width, height)), (width - size[0], height - size[1])
        canvas.paste(Image.fromarray(image).resize(size), (corner[0] // 2, corner[1] // 2))
        return np.asarray(canvas)

    def _mux(self, packet: av.Packet) -> None:
        assert self._container is not None
        time = float(_time_of(packet))
        self._container.mux(packet)
        if self._sound is not None:
            self._sound.copy_until(time)


def _time_of(packet: av.Packet) -> Fraction:
    """Presentation time of an encoded frame, in seconds."""
    assert packet.pts is not None
    return packet.pts * packet.time_base


def _even(height: int, width: int) -> tuple[int, int]:
    """The video's size for frames of a size: even, as 4:2:0 halves the colour planes, and no larger than the encoder takes."""
    scale = min(1.0, _LARGEST_SIDE / max(height, width))
    rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
    return rows + rows % 2, columns + columns % 2
