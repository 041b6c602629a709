"""How the C library gives memory back: for work whose large arrays come and go with each frame."""

import ctypes
import sys
from collections.abc import Generator, Iterable
from typing import TypeVar

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_GIBIBYTE = 2**30
_FRAMES_BETWEEN = 100  # giving back takes milliseconds

Item = TypeVar("Item")


def keep_freed_memory() -> None:
    """Let glibc keep freed arrays for the next ones, up to a GiB; nothing elsewhere.

    By default it returns large ones to the system, which clears them page by page when they are wanted again: two
    thousand faults for a 720p frame.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # arrays that are mapped one by one are given back one by one
        mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE)


def returning_gaps(frames: Iterable[Item]) -> Generator[Item, None, None]:
    """Pass frames on, and after every hundredth give the system the whole pages that glibc holds free.

    The heap of the thread that encodes grows although hardly more is in use: what lives longer than a frame's temporary
    arrays leaves gaps that glibc does not fill again. Giving their pages back lessens the growth and does not end it:
    the next frames touch most of them again (docs/performance.md).
    """
    malloc_trim = _glibc("malloc_trim")
    for count, frame in enumerate(frames, start=1):
        yield frame
        if malloc_trim is not None and count % _FRAMES_BETWEEN == 0:
            malloc_trim(0)


def _glibc(name: str) -> "ctypes._NamedFuncPointer | None":
    """A function of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
