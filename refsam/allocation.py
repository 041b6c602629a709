"""How the C library gives memory back: for work whose large arrays come and go with each frame."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_GIBIBYTE = 2**30
_TUNABLES = "GLIBC_TUNABLES"


def begin_without_caches() -> None:
    """Start this program anew with glibc's caches of small blocks switched off, unless its tunables are set; only on Linux.

    What one thread makes and another frees stays in a cache, at its place in the heap: arrays no longer fit in
    between, and memory grew by 200 MiB in 10,000 frames although no more was in use. glibc reads the setting only when a
    program starts. To be called before anything is done.
    """
    if sys.platform == "linux" and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = "glibc.malloc.tcache_count=0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Let glibc keep freed arrays for the next ones, up to a GiB; nothing elsewhere.

    By default it returns large ones to the system, which clears them page by page when they are wanted again: two
    thousand faults for a 720p frame.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # arrays that are mapped one by one are given back one by one
        mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE)


def give_back_freed_memory() -> None:
    """Return the pages that no array is on to the system, with glibc; nothing elsewhere.

    Threads run a little differently for each frame, so that arrays come to lie in ever more places: now and then, what is
    kept by `keep_freed_memory` must shrink to what is used again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
