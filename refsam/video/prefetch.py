"""Run an iterable in a thread of its own, a few items ahead."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

_LOOK = 0.1  # seconds between checks whether it was closed


def prefetch(
    items: Iterable[Item],
    depth: int = 4,
    *,
    heed: Callable[[], None] = lambda: None,
    patience: float = 0.3,
) -> "Prefetched[Item]":
    """Run an iterable in its own thread, at most ``depth`` items ahead.

    An exception of the iterable is raised after the items before it. Closing stops the thread, but does not wait forever:
    a thread that waits for a silent camera cannot be woken; it ends with the process.

    Args:
        items: iterated over in the thread.
        depth: largest number of items that wait.
        heed: called every tenth of a second while waiting; an exception that it raises reaches the caller.
        patience: seconds that closing waits for the thread.
    """
    return Prefetched(items, depth, heed, patience)


class Prefetched(Generic[Item]):
    """The iterator of `prefetch`, which any thread may close."""

    def __init__(
        self, items: Iterable[Item], depth: int, heed: Callable[[], None], patience: float
    ) -> None:
        self._ahead: queue.Queue[tuple[str, object]] = queue.Queue(depth)
        self._last: tuple[str, object] | None = None  # the end or an error, found by `waiting`
        self._stop = threading.Event()
        self._heed, self._patience = heed, patience
        self._thread = threading.Thread(
            target=self._work, args=(items,), name="refsam-prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        while not self._stop.is_set():
            try:
                kind, value = self._last or self._ahead.get(timeout=_LOOK)
            except queue.Empty:
                self._heed()
                continue
            if kind == "item":
                return value  # type: ignore[return-value]
            self._stop.set()
            if kind == "error":
                raise value  # type: ignore[misc]
        raise StopIteration

    def waiting(self, most: int) -> list[Item]:
        """Up to `most` items that are ready, without waiting; `next` delivers the end or an error."""
        items: list[Item] = []
        while len(items) < most and self._last is None and not self._stop.is_set():
            try:
                kind, value = self._ahead.get_nowait()
            except queue.Empty:
                break
            if kind == "item":
                items.append(value)  # type: ignore[arg-type]
            else:
                self._last = kind, value
        return items

    def close(self) -> None:
        """Stop; any thread may call this, even while another waits for an item."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(self._patience)

    def _work(self, items: Iterable[Item]) -> None:
        try:
            for item in items:
                self._put("item", item)
                if self._stop.is_set():
                    return
            self._put("end", None)
        except BaseException as error:  # raised again in the thread that takes the items
            self._put("error", error)

    def _put(self, kind: str, value: object) -> None:
        while not self._stop.is_set():
            try:
                return self._ahead.put((kind, value), timeout=_LOOK)
            except queue.Full:
                continue
