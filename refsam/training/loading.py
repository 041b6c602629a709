"""Batches on their way from the processes that draw them: through pipes, since shared memory is 64 MB in a container."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refsam.errors import UserError
from refsam.runtime.signals import ignore_stop_signals

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Piped(Generic[Batch]):
    """A batch whose tensors are numpy's, which are sent through a pipe; torch would put its own into shared memory."""

    content: Batch

    def unpacked(self) -> Batch:
        """The batch with tensors."""
        return _map(self.content, np.ndarray, torch.from_numpy)

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU copies from beside its work; called by the DataLoader."""
        return _map(self.unpacked(), Tensor, Tensor.pin_memory)


def draw(stream: Dataset[Batch], order: range, workers: int, pin: bool) -> Iterator[Batch]:
    """The batches with these numbers, in order, drawn ahead by `workers` other processes.

    `pin`: in memory that a GPU copies from beside its work. Raises UserError where the processes cannot be made or one of them is
    killed.
    """
    try:
        yield from _drawn(stream, order, workers, pin)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"workers: one that draws batches was ended ({str(error).splitlines()[0]}): is there too little memory? lower workers"
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        raise UserError(
            "workers: /dev/shm is full, which their locks need: free it (docker run --shm-size=1g), or take workers=0"
        ) from error


def _drawn(
    stream: Dataset[Batch], order: range, workers: int, pin: bool
) -> Generator[Batch, None, None]:
    has_ended = multiprocessing.Event() if workers else None
    loader: DataLoader[Any] = DataLoader(
        stream,
        batch_size=None,
        collate_fn=_piped if workers else None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=partial(_begin_worker, has_ended),
        pin_memory=pin and workers > 0,
    )
    try:
        for batch in loader:
            yield batch.unpacked() if isinstance(batch, Piped) else batch
    finally:
        if has_ended is not None:
            has_ended.set()


def _piped(batch: Batch) -> Piped[Batch]:
    return Piped(_map(batch, Tensor, Tensor.numpy))


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A dataclass with every field of a kind changed, also in dataclasses that it holds; other values stay."""
    if isinstance(value, kind):
        return change(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    entries = {field.name: getattr(value, field.name) for field in fields(value)}
    changed = {name: _map(entry, kind, change) for name, entry in entries.items()}
    different = {name: entry for name, entry in changed.items() if entry is not entries[name]}
    return replace(value, **different) if different else value


def _begin_worker(has_ended: Event | None, _: int) -> None:
    """Ignore signals to the whole group; once nobody wants the worker's batches, SIGTERM ends it, even while it reads."""

    def end(*_: object) -> None:
        if has_ended is not None and has_ended.is_set():
            os._exit(1)

    torch.set_num_threads(1)
    ignore_stop_signals()
    signal.signal(signal.SIGTERM, end)
