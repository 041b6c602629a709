"""How the C library gives memory back: for work whose large arrays come and go with each frame."""

import ctypes
import os
import sys
from collections.abc import Generator, Iterable
from typing import TypeVar

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_GIBIBYTE = 2**30
_FRAMES_BETWEEN = 100  # giving back takes milliseconds
_TUNABLES = "GLIBC_TUNABLES"

Item = TypeVar("Item")


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
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # arrays that are mapped one by one are given back one by one
        mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE)


def returning_gaps(frames: Iterable[Item]) -> Generator[Item, None, None]:
    """Pass frames on, and after every hundredth give the system the whole pages that glibc holds free.

    Threads run a little differently for each frame, so that arrays come to lie in ever more places: memory would grow although
    hardly more is in use (docs/performance.md).
    """
    malloc_trim = _glibc("malloc_trim")
    for count, frame in enumerate(frames, start=1):
        yield frame
        if malloc_trim is not None and count % _FRAMES_BETWEEN == 0:
            malloc_trim(0)


def _glibc(name: str) -> "ctypes._NamedFuncPointer | None":
    """A function of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
