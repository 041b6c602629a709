"""Measures time and memory of providers in turn, so that other work of the machine affects all of them equally."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

MINIMUM_ROUNDS = 5
WARM_UP_CALLS = 3  # before a capture: kernels are compiled, libraries take their workspaces
MAXIMUM_ROUNDS = 200
# Written between calls on a GPU, so that every call starts with a cold L2 cache; larger than any GPU's.
FLUSH_BYTES = 256 * 2**20

K = TypeVar("K")


@dataclass(frozen=True)
class Times:
    """Median and 20th and 80th percentile in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def summarise(samples: list[float]) -> Times:
    """The quantiles of samples in seconds."""
    quantiles = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    median, low, high = (1e3 * float(value) for value in quantiles)
    return Times(median, low, high, len(samples))


def time_cpu(provider: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    provider()
    return time.perf_counter() - start


def time_cuda(provider: Callable[[], Any]) -> float:
    """Seconds of one call on the device, with a cold L2 cache."""
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    provider()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end)


def time_interleaved(
    providers: Mapping[str, Callable[[], Any]], device: str, seconds: float
) -> dict[str, Times]:
    """Times the providers in turn, round after round, for about `seconds` in all; at least `MINIMUM_ROUNDS`."""
    timer = time_cuda if device == "cuda" else time_cpu
    # The first calls warm up; their times also decide how many rounds there will be.
    first = {name: timer(provider) for name, provider in providers.items()}
    again = {name: timer(provider) for name, provider in providers.items()}
    per_round = sum(min(first[name], again[name]) for name in providers)
    rounds = int(min(max(seconds / max(per_round, 1e-6), MINIMUM_ROUNDS), MAXIMUM_ROUNDS))
    return take_turns(providers, rounds, timer)


def take_turns(
    calls: Mapping[K, Callable[[], Any]],
    rounds: int,
    timer: Callable[[Callable[[], Any]], float] = time_cpu,
) -> dict[K, Times]:
    """Times the calls round after round, each round beginning with another one: none always follows the same one."""
    samples: dict[K, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(timer(calls[name]))
    return {name: summarise(values) for name, values in samples.items()}


def exact_products() -> None:
    """float32 means float32: no TF32 on either side of a comparison."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph's replay, which returns what the recording returned.

    Raises the capture's error: a call that looks at values has no graph.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def replays_of(providers: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The providers that have a graph, as its replay."""
    found = {}
    for name, provider in providers.items():
        try:
            found[name] = captured(provider)
        except RuntimeError:  # it looks at values, or allocates in a way that a capture forbids
            torch.cuda.synchronize()
    return found


def peak_memory(provider: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call needs at its peak in addition to those in use before it, result included; None if not measurable."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        provider()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory of earlier calls hides new one
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident size
    except OSError:
        return None
    before = resident("VmRSS")
    result = provider()
    peak = resident("VmHWM")
    del result
    return max(peak - before, 0)


def resident(field: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"field: got {field!r}, wanted one of /proc/self/status")


@dataclass(frozen=True)
class Ceiling:
    """The machine's limits in this run: bytes per second of a copy, operations per second of a product by dtype."""

    bytes_per_second: float
    flops_per_second: Mapping[torch.dtype, float]

    def milliseconds(
        self, moved_bytes: int, flops: int, dtype: torch.dtype = torch.float32
    ) -> float:
        """The time below which no implementation with products in `dtype` can stay."""
        return 1e3 * max(moved_bytes / self.bytes_per_second, flops / self.flops_per_second[dtype])

    def __str__(self) -> str:
        rates = (
            f"{rate / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
            for dtype, rate in self.flops_per_second.items()
        )
        return f"{self.bytes_per_second / 1e9:.1f} GB/s, {', '.join(rates)}"


def measure_ceiling(device: str) -> Ceiling:
    """Copies a large tensor and multiplies two large matrices of each dtype, of random values: a GPU is faster on zeros."""
    count, side = (2**28, 8192) if device == "cuda" else (2**25, 2048)
    source, target = (torch.randn(count, device=device) for _ in range(2))
    providers: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    dtypes = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    for name, dtype in dtypes.items():
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        providers[name] = partial(torch.mm, left, right)
    best = {name: t.p20_ms for name, t in time_interleaved(providers, device, 2.0).items()}
    copied, computed = 2 * source.nbytes, 2 * side**3
    products = {dtype: 1e3 * computed / best[name] for name, dtype in dtypes.items()}
    return Ceiling(1e3 * copied / best["copy"], products)
