"""The sound of a source, copied beside the overlay's frames; encoded anew only where MP4 does not take it as it is."""

from collections.abc import Iterator
from typing import Any

import av

from refsam.video.frames import reason

_IN_MP4 = frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"})


class SoundTrack:
    """Sound from a moment of a file on, in the container of another video.

    It is never worth losing masks: whatever goes wrong ends the sound, and `problem` says so.

    Args:
        path: the file.
        begin: seconds in it that are to be 0.
        container: where it goes, before anything was written there.
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
        """Write what sounds before that moment of the new video and was not written yet."""
        while self.problem is None:
            try:
                self._next = self._next or next(self._packets, None)
                if self._next is None or float(self._next.pts * self._next.time_base) >= seconds:
                    return
                packet, self._next = self._next, None
                packet.stream = self._output
            except Exception as error:
                return self._give_up(error)
            self._container.mux(packet)  # a full disk is the video's affair too

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
