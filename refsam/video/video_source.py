"""Frames of a video file, a network stream, a pipe or a camera, decoded by FFmpeg."""

import os
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from time import monotonic
from typing import Any

import av

from refsam.errors import UserError
from refsam.runtime.threads import available_cores
from refsam.video.byte_stream import ByteStream, Silence
from refsam.video.endings import is_cut_off
from refsam.video.frames import (
    EVERYTHING,
    Choice,
    Frame,
    FrameDecodeError,
    FrameSource,
    ReadOptions,
    reason,
)
from refsam.video.pictures import peculiarities, pixel_aspect, to_rgb
from refsam.video.prefetch import prefetch

_DEFAULT_FPS = Fraction(24)
_FEW_CORES = 2
_PATIENCE = 0.3  # seconds that closing waits for a thread that waits for a stream
_PATIENCE_WITH_FILES = 30.0  # decoding a frame of a file ends some time
# A stream marked as default counts as this many pixels more, as in ffmpeg.
_DEFAULT_STREAM = 5_000_000
# Text that FFmpeg would draw as terminal art.
_NO_PICTURES = frozenset({"ansi", "bintext", "xbin", "idf"})
# Their packets are whole unless the file ends within one; broadcasts may lose parts of any.
_WHOLE = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "avi", "matroska,webm", "flv", "asf", "nut"})
_PARTS = frozenset({"gif", "flv"})  # their last packet may be incomplete without being marked
_TELLS_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave it out


class VideoSource(FrameSource):
    """Frames of a video, in the order and at the times at which a viewer shows them.

    Args:
        location: path, URL, or a stream of bytes.
        container_format: FFmpeg's name of the input format; None finds it out.
        name: what messages and results call it; the location by default.
        options: range of frames, and the timeout.
        is_live: a camera, for which there is no timeout.

    Raises:
        UserError: not a video, unreadable, silent, or without a picture stream that can be decoded.
    """

    def __init__(
        self,
        location: str | ByteStream,
        container_format: str | None = None,
        name: str | None = None,
        options: ReadOptions = EVERYTHING,
        *,
        is_live: bool = False,
    ) -> None:
        super().__init__(name or (location if isinstance(location, str) else location.name))
        self._options = options
        self._location = location
        self._is_file = isinstance(location, str) and os.path.isfile(location)
        self._is_closed = self._is_cut = False
        # Held while FFmpeg reads: nobody may close the container meanwhile.
        self._busy = threading.Lock()
        began = monotonic()
        try:
            self._container = self._open(container_format, is_live)
            self._stream = self._best_stream()
            self._describe()
        except Exception as error:
            if isinstance(location, ByteStream):
                location.close()
            # FFmpeg's RTSP calls a server's silence invalid data.
            was_silent = isinstance(error, av.error.InvalidDataError) and (
                0 < options.timeout <= monotonic() - began
            )
            if was_silent and not self._is_file:
                raise Silence(self.name, options.timeout) from error
            raise self._not_readable(error) from error

    def _open(self, container_format: str | None, is_live: bool) -> Any:
        timeout = self._options.timeout or None
        settings: dict[str, Any] = {"format": container_format, "metadata_errors": "replace"}
        if self._is_file:  # the prefix keeps colons in a path from being taken for a protocol
            return av.open(f"file:{self._location}", **settings)
        if isinstance(self._location, str) and not is_live:
            settings["timeout"] = timeout, timeout
        return _in_thread(lambda: av.open(self._location, **settings))

    def _best_stream(self) -> Any:
        """The largest stream that can be decoded, with a bonus for the default one, as in ffmpeg."""
        marks = av.stream.Disposition
        # An attached picture is the cover of music.
        streams = [
            s for s in self._container.streams.video if not s.disposition & marks.attached_pic
        ]
        known = [s for s in streams if s.codec_context is not None]
        usable = [s for s in known if s.codec_context.name not in _NO_PICTURES]
        problem = None
        if not usable and len(known) < len(streams):
            problem = "is encoded in a way that FFmpeg cannot decode: encode it again"
        elif not usable:
            problem = "holds no video: give a video, an image or a folder of images"
        elif any(s.disposition & marks.dependent for s in usable):
            problem = "is an image in tiles: name it .heic or .avif, or give a JPEG or PNG"
        if problem is not None:
            raise UserError(f"{self.name} {problem}")
        return max(usable, key=_rank)

    def _describe(self) -> None:
        stream, context = self._stream, self._stream.codec_context
        # On few cores, decoding several frames at a time slows everything else by as much as it gains.
        context.thread_type = "AUTO" if available_cores() > _FEW_CORES else "SLICE"
        if self._options.max_pixels is not None:  # before the decoder makes room for a frame
            context.options = {"max_pixels": str(self._options.max_pixels)}
            self._options.check_size(self.name, stream.height or 0, stream.width or 0)
        self._decoder = context
        alpha = _TELLS_ALPHA.get(context.name)
        if alpha and stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1":
            self._decoder = av.CodecContext.create(alpha, "r")
            self._decoder.extradata = context.extradata
        self._has_times = not self._container.format.flags & av.format.Flags.no_timestamps.value
        rates = [stream.average_rate, stream.guessed_rate]
        if not self._has_times:
            rates.insert(0, context.framerate)  # the container's is invented
        self.fps = next((rate for rate in rates if rate), _DEFAULT_FPS)
        self.time_base = stream.time_base or 1 / self.fps
        self.aspect = pixel_aspect(stream.sample_aspect_ratio or context.sample_aspect_ratio)
        self.expected_frames = self._options.expected(self._announced_frames(), self.fps)
        if self._is_file and self._container.streams.audio:
            self.sound = str(self._location), float((stream.start_time or 0) * self.time_base)

    def _announced_frames(self) -> int | None:
        """Number of frames that a viewer would show, edits of the file taken into account."""
        stream = self._stream
        if "mp4" in self._container.format.name and stream.frames and len(stream.index_entries):
            return sum(not entry.is_discard for entry in stream.index_entries)
        if stream.frames:
            return stream.frames
        if not self._container.duration:
            return None
        seconds, begin = self._container.duration / 1e6, self._container.start_time
        if stream.start_time is not None and stream.time_base and begin is not None:
            seconds -= float(stream.start_time * stream.time_base) - begin / 1e6
        return max(1, round(seconds * self.fps))

    def __iter__(self) -> Iterator[Frame]:
        choice = Choice(self._options)
        for index, time, picture in self._pictures():
            if choice.has_ended(time):
                return
            if choice.takes(index, time):
                yield self._frame(index, time, picture)
                if choice.has_ended():
                    return

    def _frame(self, index: int, time: float, picture: av.VideoFrame) -> Frame:
        for text in peculiarities(picture):
            self.note(text)
        self._options.check_size(self.name, picture.height, picture.width)
        image, transposed = to_rgb(picture)
        return Frame(index, time, image, 1 / self.aspect if transposed else self.aspect)

    def _pictures(self) -> Iterator[tuple[int, float, av.VideoFrame]]:
        """Every frame that can be decoded, with its number and time."""
        index, time, end = 0, 0.0, 0.0
        start: float | None = None
        decoded = self._decoded()
        while True:
            try:
                picture, problem = next(decoded)
            except StopIteration:
                break
            except Exception as error:  # no packet can be found after it
                raise self._reading_error(index, error) from error
            if picture is None or picture.is_corrupt:
                self._refuse_or_skip(index, problem or "the data is damaged")
                index, end = index + 1, end + float(1 / self.fps)
                continue
            # A frame without a time, or one that runs backwards, follows where the last one ends.
            now = end if picture.time is None or start is None else picture.time - start
            if self._is_cut and now > end + 0.5 / self.fps:
                break  # the cut took the frames in between, so this one's number is not known
            time = now if now > time or index == 0 else end
            if start is None and picture.time is not None:
                start = picture.time - time
            end = time + self._duration(picture)
            yield index, time, picture
            index += 1
        if index == len(self.skipped) or self._is_cut:
            raise self._decode_error(index, "the file ends there")

    def _decoded(self) -> Iterator[tuple[av.VideoFrame | None, str | None]]:
        """Decoded pictures, or the decoder's error in place of one."""
        for packet in self._packets():
            try:
                decoded = self._do(lambda: self._decoder.decode(packet))  # noqa: B023
            except EOFError:  # the decoder was flushed already
                return
            except Exception as error:
                yield None, reason(error)
                continue
            for picture in decoded or ():
                yield picture, None

    def _packets(self) -> Iterator[av.Packet]:
        """The stream's packets, then an empty one; of a truncated file the packets before the cut."""
        self._reached, self._count = 0, 0
        packets = self._container.demux(self._stream)
        held: av.Packet | None = None
        while packet := self._do(lambda: next(packets, None)):
            if packet.is_corrupt and self._container.format.name in _WHOLE:
                self._is_cut = True
            if self._is_cut or not packet.size:
                break
            self._reached = max(self._reached, (packet.pos or 0) + packet.size)
            self._count += 1
            if not self._is_file:
                yield packet
                continue
            # The last packet may be incomplete without a mark; this is known only at the end.
            if held is not None:
                yield held
            held = packet
        self._is_cut = self._is_cut or self._ends_early()
        if held is not None and not (self._is_cut and self._container.format.name in _PARTS):
            yield held
        last = av.Packet()  # empty: it flushes the decoder
        last.time_base = self.time_base
        yield last

    def _do(self, step: Callable[[], Any]) -> Any:
        """Run one step of FFmpeg, during which no thread may close the container."""
        with self._busy:
            return None if self._is_closed else step()

    def _refuse_or_skip(self, index: int, problem: str) -> None:
        error = self._decode_error(index, problem)
        if not self._options.skip_bad_frames:
            raise error
        self.skipped[index] = problem

    def _ends_early(self) -> bool:
        """Whether the file was truncated, which FFmpeg takes for its end."""
        kind = self._container.format.name
        if "mp4" in kind:
            index = self._stream.index_entries
            if any(e.size and e.pos >= self._reached and not e.is_discard for e in index):
                return True
        elif kind == "avi" and 0 < self._stream.frames <= self._count:
            return False  # only the index behind the frames is missing
        return self._is_file and is_cut_off(str(self._location), kind)

    def _duration(self, picture: av.VideoFrame) -> float:
        if picture.duration and picture.time_base and self._has_times:
            return float(picture.duration * picture.time_base)
        return float(1 / self.fps)

    def close(self) -> None:
        """Close the file or device, unless a thread that cannot be woken still waits for it."""
        if isinstance(self._location, ByteStream):
            self._location.close()
        patience = _PATIENCE_WITH_FILES if self._is_file else _PATIENCE
        if self._busy.acquire(timeout=patience):
            self._is_closed = True
            self._container.close()
            self._busy.release()

    def _reading_error(self, index: int, error: Exception) -> UserError:
        silence = self._silence(error)
        if silence is None:
            return self._decode_error(index, reason(error))
        return silence if index == 0 else FrameDecodeError(f"frame {index} did not come: {silence}")

    def _silence(self, error: Exception) -> Silence | None:
        if isinstance(error, Silence):
            return error
        if isinstance(error, av.error.ExitError):  # FFmpeg's error after its time limit
            return Silence(self.name, self._options.timeout)
        return None

    def _decode_error(self, index: int, problem: str) -> UserError:
        if index == len(self.skipped):
            words = f"holds no frame that can be decoded ({problem}): give a complete video"
            return UserError(f"{self.name} {words}")
        words = f"({problem}): repair or re-encode the file"
        return FrameDecodeError(f"frame {index} of {self.name} cannot be decoded {words}")

    def _not_readable(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        if silence := self._silence(error):
            return silence
        hint = "give a complete video file, an image or a folder of images"
        if isinstance(self._location, ByteStream):
            hint = "a stream is read from front to back, so an MP4 needs its index in front (-movflags faststart)"
        return UserError(f"{self.name} cannot be read as a video ({reason(error)}): {hint}")


def _rank(stream: Any) -> tuple[int, int]:
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    pixels = (stream.width or 0) * (stream.height or 0)
    return pixels + _DEFAULT_STREAM * is_default, -stream.index


def _in_thread(call: Callable[[], Any]) -> Any:
    """Run a call that may block forever in another thread, so that Ctrl-C still works here."""
    return next(prefetch(call() for _ in range(1)))
