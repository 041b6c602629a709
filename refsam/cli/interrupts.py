"""Ctrl-C where threads work for each other."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Hold an interrupt back until what this yields is called, which raises it; a second one is raised at once.

    Raised at any instruction, it can come between the taking of a queue's lock and the block that gives it back: then
    threads wait for each other for ever. Outside the main thread, and where interrupts are ignored, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    was_asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        if was_asked:
            raise KeyboardInterrupt
        was_asked = True

    def check() -> None:
        if was_asked:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
