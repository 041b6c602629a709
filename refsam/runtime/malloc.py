"""Keeps freed memory in the process, for work whose large arrays come and go with each frame."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_GIBIBYTE = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep up to a GiB of freed memory for the next arrays; does nothing on other systems.

    By default glibc returns large arrays to the system, which clears their pages when they are used again: two thousand
    page faults for a 720p frame.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # arrays that are mapped one by one are given back one by one
        mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE)
