"""An interrupt waits for a safe place, a second one does not, and afterwards all is as it was."""

import os
import signal
import sys
import threading

import pytest

from refsam.runtime.signals import defer_interrupts

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot interrupt itself")


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
