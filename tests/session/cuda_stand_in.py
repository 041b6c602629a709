"""A stand-in for the parts of torch.cuda that graphs and uploads use: it records what runs and runs it again, on the CPU.

A graph's capture records each operator with its tensors; its replay runs them anew on the same memory, as a device does. What a
device forbids while capturing, looking at values, is an error here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


class CaptureError(RuntimeError):
    """Something that cannot be captured."""


class Recorder(TorchDispatchMode):
    """Remembers every operator with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in LOOKS:
            raise CaptureError(f"{func} looks at values while a graph is captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class CUDAGraph:
    """What was recorded; replaying writes into the tensors of the recording."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        """Run the recorded operators again."""
        self.replays += 1
        for func, args, kwargs, recorded in self.calls:
            given = {memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            found = func(*args, **kwargs)
            pairs = zip(tree_leaves(recorded), tree_leaves(found), strict=True)
            for old, new in pairs:
                if isinstance(old, Tensor) and old.numel() and memory(old) not in given:
                    old.copy_(new)


def memory(tensor: Tensor) -> int:
    """Which memory a tensor lies in: views have that of their base."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # oneDNN's own layout
        return 0


class Event:
    """Counts what is asked of it."""

    def record(self, stream: object = None) -> None:
        """Nothing to wait for on a CPU."""

    def synchronize(self) -> None:
        """Nothing to wait for on a CPU."""


class Stream:
    """One order of work, that of the program."""

    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing to wait for on a CPU."""

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for on a CPU."""


@contextmanager
def capture(graph: CUDAGraph) -> Iterator[None]:
    """As `torch.cuda.graph`."""
    with Recorder() as recorder:
        yield
    graph.calls = recorder.calls


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """As `torch.cuda.stream`."""
    yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in torch.cuda's place; the operators treat values as if they lay on a device."""
    reserved = iter(range(0, 2**40, 2**20))
    replacements = {
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "Event": Event,
        "Stream": Stream,
        "stream": on_stream,
        "current_stream": lambda device=None: Stream(device),
        "memory_reserved": lambda device=None: next(reserved),
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("refsam_kernels.core.index_checks._can_be_seen", lambda tensor: False)
