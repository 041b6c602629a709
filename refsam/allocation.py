"""How memory is kept: for work whose large arrays come and go with each frame."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_GIBIBYTE = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep freed arrays for the next ones, up to a GiB, and torch ask for huge pages; nothing elsewhere.

    By default glibc returns large arrays to the system, which clears them page by page when they are wanted again: two
    thousand faults for a 720p frame. A large page instead of 512 small ones spares the processor most of its search for
    addresses; THP_MEM_ALLOC_ENABLE says otherwise. Torch reads it at its first tensor, so call this before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # arrays that are mapped one by one are given back one by one
        mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
