"""Bytes of a pipe or socket, with a timeout, for FFmpeg to read."""

import os
import re
import select
import socket
import stat
import sys
import time

from refsam.errors import UserError

_LOOK = 0.1  # seconds between checks whether it was closed


class Silence(UserError):
    """No byte came before the timeout."""

    def __init__(self, name: str, timeout: float) -> None:
        super().__init__(
            f"{name} sent nothing for {timeout:g} s: --timeout 0 waits forever, another number as many seconds"
        )


class ByteStream:
    """A pipe, a socket or standard input as a file that can only be read forwards.

    Args:
        descriptor: of an open file; closed with the stream.
        name: for messages.
        timeout: seconds without a byte after which reading fails; 0 waits forever.
    """

    def __init__(self, descriptor: int, name: str, timeout: float) -> None:
        self.name = name
        self._descriptor = descriptor
        self._timeout = timeout
        self._closed = False

    def read(self, count: int) -> bytes:
        """Up to that many bytes as soon as there are any; none at the end.

        Raises:
            Silence: no byte in time.
        """
        patient_until = time.monotonic() + self._timeout
        while not self._closed:
            if sys.platform == "win32" or select.select([self._descriptor], [], [], _LOOK)[0]:
                try:
                    return os.read(self._descriptor, count)
                except BlockingIOError:
                    continue
            if self._timeout and time.monotonic() > patient_until:
                raise Silence(self.name, self._timeout)
        return b""

    def close(self) -> None:
        """Wake the reader; it gets no more bytes."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)


def open_stream(path: str, timeout: float) -> ByteStream | None:
    """Open a path that is a pipe, a socket or standard input (``-``); None for seekable files.

    Raises OSError: it cannot be opened.
    """
    if path == "-":
        return ByteStream(os.dup(0), "standard input", timeout)
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode):
        # Without O_NONBLOCK opening would wait for a writer, and could not be interrupted.
        return ByteStream(os.open(path, os.O_RDONLY | os.O_NONBLOCK), path, timeout)
    if stat.S_ISSOCK(mode):
        if own := re.fullmatch(r"/dev/stdin|(?:/dev|/proc/self)/fd/(\d+)", path):
            # Such a path names no file that could be opened: read from the descriptor itself.
            return ByteStream(os.dup(int(own[1] or 0)), path, timeout)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return ByteStream(connection.detach(), path, timeout)
    return None
