"""The sound of a source, copied into the overlay; it is encoded again only if MP4 cannot hold its codec."""

from collections.abc import Iterator
from typing import Any

import av

from refsam.video.frames import reason

_IN_MP4 = frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"})


class SoundTrack:
    """The sound of a file, starting at `begin`, copied into the container of another video.

    An error ends the sound and sets `problem`; it never ends the run.

    Args:
        path: the file.
        begin: the time in the file, in seconds, that becomes 0.
        container: the output container, before anything was written to it.
    """

    def __init__(self, path: str, begin: float, container: Any) -> None:
        self.problem: str | None = None
        self._begin, self._container = begin, container
        self._input: Any = None
        self._next: Any = None
        try:
            self._input = av.open(f"file:{path}", metadata_errors="replace")
            stream = self._input.streams.best("audio")
            if stream.codec_context.name in _IN_MP4:
                self._output = container.add_stream_from_template(stream)
                self._packets = self._copied(stream)
            else:
                self._output = container.add_stream("aac", rate=stream.codec_context.sample_rate)
                self._packets = self._encoded(stream)
        except Exception as error:
            self._give_up(error)

    def copy_until(self, seconds: float) -> None:
        """Write the sound up to that time of the new video."""
        while self.problem is None:
            try:
                self._next = self._next or next(self._packets, None)
                if self._next is None or float(self._next.pts * self._next.time_base) >= seconds:
                    return
                packet, self._next = self._next, None
                packet.stream = self._output
            except Exception as error:
                return self._give_up(error)
            # Its error is the caller's: a full disk ends the video, too.
            self._container.mux(packet)

    def close(self) -> None:
        """Close the file."""
        if self._input is not None:
            self._input.close()

    def _copied(self, stream: Any) -> Iterator[Any]:
        for packet in self._input.demux(stream):
            if packet.size and packet.pts is not None:
                shift = round(self._begin / packet.time_base)
                packet.pts -= shift
                packet.dts = packet.pts
                if packet.pts >= 0:
                    yield packet

    def _encoded(self, stream: Any) -> Iterator[Any]:
        for frame in self._input.decode(stream):
            frame.pts = round((frame.time - self._begin) / frame.time_base)
            if frame.pts >= 0:
                yield from self._output.encode(frame)
        yield from self._output.encode(None)

    def _give_up(self, error: Exception) -> None:
        self.problem = f"the sound could not be kept ({reason(error)})"
