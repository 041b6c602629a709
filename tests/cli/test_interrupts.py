"""An interrupt waits for a safe place, a second one does not, and afterwards all is as it was."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from refsam.cli.frame_loop import exit_code
from refsam.runtime.signals import Terminated, defer_interrupts, termination_interrupts

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot interrupt itself")


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Ctrl-C is heeded as usual: nohup and a shell's background jobs ignore it, and so would what they start."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_until_it_is_asked_for() -> None:
    with defer_interrupts() as check:
        check()
        interrupt()
        reached = True
        with pytest.raises(KeyboardInterrupt):
            check()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_raised_at_once() -> None:
    with defer_interrupts():
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_waits_too_and_says_what_it_was(number: signal.Signals) -> None:
    with defer_interrupts() as check:
        os.kill(os.getpid(), number)
        with pytest.raises(Terminated, match=f"ended by {number.name}"):
            check()
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_interrupts_at_once_where_nothing_is_deferred(number: signal.Signals) -> None:
    with pytest.raises(Terminated) as interrupt, termination_interrupts():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert exit_code(interrupt.value) == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_ignored_interrupts_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_interrupts() as check:
            interrupt()
            check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing() -> None:
    handlers = []

    def work() -> None:
        with defer_interrupts() as check:
            check()
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
