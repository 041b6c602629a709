"""SIGTERM and Ctrl-C ask work to stop at a place where it can."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Signals that end a process by default: Ctrl-C, Slurm and containers, a closed terminal (unknown to Windows).
ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class WaitedTooLongError(Exception):
    """A signal asked to stop, and a wait did not end in time."""


class StopRequest:
    """Within a `with` block, `signal` is the first of the signals that arrived, 0 before that; by default of SIGTERM and SIGINT.

    A second SIGINT interrupts at once. `save_wanted` says that SIGUSR1 arrived, if that is among the signals. Python handles
    signals in the main thread only: elsewhere nothing is caught.
    """

    def __init__(self, signals: Sequence[signal.Signals] = _SIGNALS) -> None:
        self.signal = 0
        self.save_wanted = False
        self._handled = _handled(signals, self._note)
        self._patience: float | None = None

    def __enter__(self) -> "StopRequest":
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.__exit__(None, None, None)

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Guard a wait that may never end: WaitedTooLongError is raised this many seconds after a signal asked to stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, _give_up)
        self._patience = seconds
        if self.signal:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            self._patience = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_wanted = True
            return
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        if self._patience is not None:
            signal.setitimer(signal.ITIMER_REAL, self._patience)


def _give_up(number: int, _: FrameType | None) -> None:
    raise WaitedTooLongError


def ignore_stop_signals() -> None:
    """For helper processes of the one that handles the signals: a terminal and torchrun signal the whole group."""
    for number in (*_SIGNALS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def _handled(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Give these signals a handler within the block; nothing changes outside the main thread."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block by `Terminated`, as Ctrl-C does; handlers of others stay in place."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    unhandled = [n for n in ENDING[1:] if signal.getsignal(n) is signal.SIG_DFL]
    with _handled(unhandled, interrupt):
        yield


@contextmanager
def defer_interrupts() -> Iterator[Callable[[], None]]:
    """Defer Ctrl-C, SIGTERM and SIGHUP: the yielded function raises them when it is called. A second Ctrl-C comes at once.

    An exception raised at any instruction could hit between taking a queue's lock and the block that releases it: threads
    would wait for each other forever. Nothing changes outside the main thread, or for signals that are ignored.
    """
    with StopRequest(_heeded()) as request:

        def check() -> None:
            if request.signal == signal.SIGINT:
                raise KeyboardInterrupt
            if request.signal:
                raise Terminated(request.signal)

        yield check


@contextmanager
def postponed() -> Iterator[None]:
    """Postpone signals that would end the process until the block is done; then each takes its usual effect.

    For steps that must not be left half done. Nothing changes outside the main thread, where no signal is handled.
    """
    arrived: list[int] = []
    try:
        with _handled(_heeded(), lambda number, _: arrived.append(number)):
            yield
    finally:
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)


def _heeded() -> list[signal.Signals]:
    """The signals that end the process and are not ignored."""
    return [n for n in ENDING if signal.getsignal(n) not in (signal.SIG_IGN, None)]
