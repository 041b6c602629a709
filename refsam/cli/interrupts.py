"""Ctrl-C where threads work for each other."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refsam.interruption import StopRequest


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Hold an interrupt back until what this yields is called, which raises it; a second one is raised at once.

    Raised at any instruction, it can come between the taking of a queue's lock and the block that gives it back: then
    threads wait for each other for ever. Outside the main thread, and where interrupts are ignored, nothing changes.
    """
    is_heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with StopRequest((signal.SIGINT,) if is_heeded else ()) as request:

        def check() -> None:
            if request.signal:
                raise KeyboardInterrupt

        yield check
