"""Memory that the C library holds, to see whether calls leak."""

import ctypes
import gc
import sys
from collections.abc import Callable

import pytest

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Report(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def bytes_left_by(call: Callable[[], object], times: int = 150) -> float:
    """Bytes in use that each call leaves behind: the least of three rounds, since what is kept once counts in one of them."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo2 is None:
        pytest.skip("needs glibc 2.33 to ask what is in use")
    mallinfo2.restype = _Report

    def in_use() -> int:
        gc.collect()
        report = mallinfo2()
        return report.uordblks + report.hblkhd

    rounds = []
    gc.collect()
    gc.freeze()  # the collections below look at new objects only, not at all modules of the tests
    try:
        for _ in range(3):
            before = in_use()
            for _ in range(times):
                call()
            rounds.append((in_use() - before) / times)
    finally:
        gc.unfreeze()
    return min(rounds)
