"""How the C library gives memory back: for work whose large arrays come and go with each frame."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MEBIBYTE = 2**20


def keep_freed_memory() -> None:
    """Let glibc keep freed arrays for the next ones, up to some hundred MiB; nothing elsewhere.

    By default it returns large ones to the system, which clears them page by page when they are wanted again: two
    thousand faults for a 720p frame.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * _MEBIBYTE)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 256 * _MEBIBYTE)
