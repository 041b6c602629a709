"""Pauses Python's garbage collector while a command starts."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause Python's garbage collector, for imports and loading.

    They make a million objects that stay. The collector looks through them again and again, a fifth of a command's start;
    afterwards it leaves out what is there by then (`gc.freeze`).
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
