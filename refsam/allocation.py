"""How the C library gives memory back: for work whose large arrays come and go with each frame."""

import ctypes
import sys
from collections.abc import Generator, Iterable
from typing import TypeVar

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_GIBIBYTE = 2**30
_FRAMES_BETWEEN = 100  # giving back takes milliseconds

Item = TypeVar("Item")


def keep_freed_memory() -> None:
    """Let glibc keep freed arrays for the next ones, up to a GiB, in one heap for all threads; nothing elsewhere.

    By default it returns large ones to the system, which clears them page by page when they are wanted again: two
    thousand faults for a 720p frame. And each thread has a heap of its own; that of the thread that encodes grew with the
    frames. To be called before threads begin.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # arrays that are mapped one by one are given back one by one
        mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE)
        mallopt(_M_ARENA_MAX, 1)


def returning_gaps(frames: Iterable[Item]) -> Generator[Item, None, None]:
    """Pass frames on, and after every hundredth give the system the whole pages that glibc holds free.

    What lives longer than a frame's temporary arrays leaves gaps that glibc does not fill again, and memory would grow by
    megabytes in a thousand frames although hardly more is in use (docs/performance.md).
    """
    malloc_trim = _glibc("malloc_trim")
    for count, frame in enumerate(frames, start=1):
        yield frame
        if malloc_trim is not None and count % _FRAMES_BETWEEN == 0:
            malloc_trim(0)


def _glibc(name: str) -> "ctypes._NamedFuncPointer | None":
    """A function of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
