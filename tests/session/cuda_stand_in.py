"""A stand-in for the parts of torch.cuda that graphs and uploads use: it records what runs and runs it again, on the CPU.

A graph's capture records each operator with its tensors; its replay runs them anew on the same memory, as a device does. What a
device forbids while capturing is an error here too: looking at values; capturing on another device's stream; in the mode
"global", waiting in another thread.
"""

import threading
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


class State:
    """The state of torch.cuda: the current device, the device of the work, and the capture in progress."""

    def __init__(self) -> None:
        self.current = 0
        self.of_work: int | None = None  # None: the current device, whichever it is
        self.capturing: tuple[str, int] | None = None  # mode and thread

    def refuse_unsafe(self, call: str) -> None:
        """Fails as another thread's call does during a capture in the mode "global"."""
        if self.capturing and self.capturing[0] == "global":
            raise CaptureError(f"{call} while a graph is captured in the mode 'global'")


STATE = State()


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
    """The recorded operators; replaying writes into the tensors of the recording."""

    BYTES = 2**20

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.replays = 0

    def pool(self) -> tuple[int, int]:
        """The name of the graph's own memory."""
        return (0, id(self))

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
        STATE.refuse_unsafe("Event.synchronize")


class Stream:
    """One order of work, that of the program."""

    def __init__(self, device: object = None) -> None:
        self.device = STATE.current if device is None else index_of(device)
        self.waits = 0

    def synchronize(self) -> None:
        """Nothing to wait for on a CPU."""
        STATE.refuse_unsafe("Stream.synchronize")

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing to wait for on a CPU."""

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for on a CPU."""


def index_of(device: object) -> int:
    """A device's number."""
    return device if isinstance(device, int) else getattr(device, "index", None) or 0


@contextmanager
def on_device(device: object) -> Iterator[None]:
    """As `torch.cuda.device`."""
    before, STATE.current = STATE.current, index_of(device)
    try:
        yield
    finally:
        STATE.current = before


class Capture:
    """As `torch.cuda.graph`, whose stream is made once, on the device that is then the current one."""

    default_capture_stream: Stream | None = None

    def __init__(
        self,
        graph: CUDAGraph,
        pool: object = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        if stream is None:
            stream = Capture.default_capture_stream = Capture.default_capture_stream or Stream()
        self.graph, self.stream, self.mode = graph, stream, capture_error_mode
        self.recorder = Recorder()

    def __enter__(self) -> None:
        work = STATE.current if STATE.of_work is None else STATE.of_work
        if not self.stream.device == STATE.current == work:
            message = f"work on cuda:{work}, captured on cuda:{self.stream.device}"
            raise CaptureError(f"{message} while cuda:{STATE.current} is the current device")
        STATE.capturing = (self.mode, threading.get_ident())
        self.recorder.__enter__()

    def __exit__(self, *error: Any) -> None:
        STATE.capturing = None
        self.recorder.__exit__(*error)
        self.graph.calls = self.recorder.calls


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """As `torch.cuda.stream`."""
    yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in torch.cuda's place; the operators treat values as if they lay on a device."""
    monkeypatch.setattr(Capture, "default_capture_stream", None)
    monkeypatch.setattr(f"{__name__}.STATE", State())
    made: list[CUDAGraph] = []

    def make_graph() -> CUDAGraph:
        made.append(CUDAGraph())
        return made[-1]

    def snapshot() -> list[dict[str, Any]]:
        others = [{"total_size": 2**30, "segment_pool_id": (0, 0)}]
        return others + [
            {"total_size": CUDAGraph.BYTES, "segment_pool_id": graph.pool()} for graph in made
        ]

    replacements = {
        "CUDAGraph": make_graph,
        "graph": Capture,
        "Event": Event,
        "Stream": Stream,
        "stream": on_stream,
        "device": on_device,
        "current_stream": lambda device=None: Stream(device),
        "memory_snapshot": snapshot,
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("refsam_kernels.core.index_checks._can_be_seen", lambda tensor: False)
