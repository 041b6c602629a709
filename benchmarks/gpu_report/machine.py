"""The device that a task measures: the GPU, or in a rehearsal the CPU in its place, with sizes that take no time."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from benchmarks import measure
from benchmarks.gpu_report.rows import Rows
from refsam_kernels import BackendError

IS_REHEARSAL = bool(os.environ.get("REFSAM_REPORT_REHEARSAL"))
DEVICE = "cpu" if IS_REHEARSAL else "cuda"

Call = Callable[[], Any]
Made = TypeVar("Made")


def captured(call: Call) -> Call:
    """As `benchmarks.measure.captured`; in a rehearsal the call itself."""
    return call if IS_REHEARSAL else measure.captured(call)


def seconds_of(call: Call) -> float:
    """Seconds of one call on the device, with a cold L2 cache; in a rehearsal seconds by the clock."""
    return measure.time_cpu(call) if IS_REHEARSAL else measure.time_cuda(call)


def median_ms(call: Call, seconds: float, least: int = 5, most: int = 50) -> dict[str, Any]:
    """Median and quantiles of about `seconds` of calls, in milliseconds."""
    least, most = (1, 1) if IS_REHEARSAL else (least, most)
    first = min(seconds_of(call) for _ in range(1 if IS_REHEARSAL else 2))
    count = int(min(max(seconds / max(first, 1e-6), least), most))
    return asdict(measure.summarise([seconds_of(call) for _ in range(count)]))


def timed(call: Call, seconds: float = 0.5) -> dict[str, Any]:
    """Times of a call by graph replay and, separately, eager; why there is no graph, if there is none."""
    eager = median_ms(call, seconds / 2)["median_ms"]
    try:
        replay = captured(call)
    except Exception as error:
        raise_if_sticky(error)
        return {"eager_ms": eager, "no_graph": first_line(error)}
    return median_ms(replay, seconds) | {"eager_ms": eager}


def timed_and_weighed(call: Call, seconds: float, flops: int) -> dict[str, Any]:
    """As `timed`, with the rate of that many operations, and the memory that a call needs at its peak."""
    found = timed(call, seconds)
    rate = 1e-9 * flops / found.get("median_ms", found["eager_ms"])
    return found | {"TFLOP/s": rate, "peak_bytes": measure.peak_memory(call, DEVICE)}


def attempt(rows: Rows, measuring: Callable[[], dict[str, Any]], **facts: Any) -> None:
    """Writes a row: the result of `measuring`, or `skipped` with a backend's refusal, or `wrong` with the reason of a failure.

    A device that failed for good ends the task.
    """
    try:
        found = measuring()
    except BackendError as refusal:
        rows.write(**facts, skipped=first_line(refusal))
        return
    except Exception as error:
        rows.write(**facts, wrong=first_line(error))
        raise_if_sticky(error)
        return
    rows.write(**facts, **found)


def made(rows: Rows, making: Callable[[], Made], **facts: Any) -> Made | None:
    """Calls `making`, whose result is then measured; None, and a row with `wrong`, if it fails."""
    try:
        return making()
    except Exception as error:
        rows.write(**facts, wrong=first_line(error))
        raise_if_sticky(error)
        return None


def raise_if_sticky(error: Exception) -> None:
    """Raises the error again if the device no longer works in this process."""
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
