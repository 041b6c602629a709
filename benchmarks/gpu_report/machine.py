"""The device that a task measures: the GPU, or in a rehearsal the CPU in its place, with sizes that take no time."""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from benchmarks.gpu_report.rows import Rows
from refsam_kernels import BackendError

IS_REHEARSAL = bool(os.environ.get("REFSAM_REPORT_REHEARSAL"))
DEVICE = "cpu" if IS_REHEARSAL else "cuda"
WARM_UP_CALLS = 3
# Written before each sample, so that it starts with a cold L2 cache; larger than any GPU's.
FLUSH_BYTES = 256 * 2**20

Call = Callable[[], Any]


def exact_products() -> None:
    """float32 means float32: no TF32 on either side of a comparison."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def captured(call: Call) -> Call:
    """The call as a CUDA graph's replay, which returns what the recording returned; in a rehearsal the call itself.

    Raises what the capture raises: a call that looks at values has no graph.
    """
    if IS_REHEARSAL:
        return call
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


def seconds_of(call: Call) -> float:
    """One call's time on the device, with a cold L2 cache; in a rehearsal the clock's."""
    if IS_REHEARSAL:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def median_ms(call: Call, seconds: float, least: int = 5, most: int = 50) -> dict[str, Any]:
    """Median and quantiles of about `seconds` of calls, in milliseconds."""
    least, most = (1, 1) if IS_REHEARSAL else (least, most)
    first = min(seconds_of(call) for _ in range(1 if IS_REHEARSAL else 2))
    count = int(min(max(seconds / max(first, 1e-6), least), most))
    samples = sorted(1e3 * seconds_of(call) for _ in range(count))
    return {
        "ms": statistics.median(samples),
        "p20_ms": samples[len(samples) // 5],
        "p80_ms": samples[len(samples) * 4 // 5],
        "samples": count,
    }


def timed(call: Call, seconds: float = 0.5) -> dict[str, Any]:
    """Times of a call by graph replay and, separately, eager; why there is no graph, if there is none."""
    eager = median_ms(call, seconds / 2)["ms"]
    try:
        replay = captured(call)
    except Exception as error:
        raise_if_sticky(error)
        return {"eager_ms": eager, "no_graph": first_line(error)}
    return median_ms(replay, seconds) | {"eager_ms": eager}


def peak_bytes(call: Call) -> int | None:
    """Device memory that a call needs at its peak beyond what lies there before."""
    if IS_REHEARSAL:
        call()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def attempt(rows: Rows, measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
    """Writes a row of what `measure` finds, with `skipped` a backend's refusal, or with `wrong` why it failed.

    A device that failed for good ends the task.
    """
    try:
        found = measure()
    except BackendError as refusal:
        rows.write(**facts, skipped=first_line(refusal))
        return
    except Exception as error:
        rows.write(**facts, wrong=first_line(error))
        raise_if_sticky(error)
        return
    rows.write(**facts, **found)


def raise_if_sticky(error: Exception) -> None:
    """Raises the error again if the device does nothing more in this process."""
    if IS_REHEARSAL:
        return
    with suppress(torch.OutOfMemoryError):
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        raise error from None


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
