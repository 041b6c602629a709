"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_INTERVAL = 5.0  # seconds


@contextmanager
def progress(
    what: str, total: int | None, unit: str = "frames", *, quiet: bool = False
) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each unit of work; everything is printed to stderr.

    Args:
        what: shown in front of the bar.
        total: expected number of units; None if unknown.
        unit: what is counted, in the plural.
        quiet: print nothing.
    """
    if quiet:
        yield lambda: None
    elif sys.stderr.isatty():
        yield from _bar(what, total, unit)
    else:
        yield _line_printer(what, total, unit)


def _bar(what: str, total: int | None, unit: str) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class Rate(TextColumn):
        def render(self, task):  # type: ignore[no-untyped-def]
            self.text_format = f"{task.speed or 0:.1f} {unit}/s"
            return super().render(task)

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), Rate(""), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _line_printer(what: str, total: int | None, unit: str) -> Callable[[], None]:
    started = printed = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, printed
        done += 1
        now = time.monotonic()
        if now - printed >= _LINE_INTERVAL:
            printed = now
            of = f" of {total}" if total else ""
            print(
                f"{what}: {done}{of} {unit}, {done / (now - started):.1f} {unit}/s",
                file=sys.stderr,
                flush=True,
            )

    return advance
