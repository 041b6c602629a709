"""One attention of SAM alone, forward and with its backward, beside SDPA with and without a bias and FlexAttention.

SDPA without a bias, on windows that are cut and padded before the clock starts, is the ceiling.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu_report.machine import (
    DEVICE,
    IS_REHEARSAL,
    attempt,
    peak_bytes,
    timed,
)
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products
from benchmarks.ops.rel_pos_attention import Setting, workload
from benchmarks.registry import Workload

SECONDS = 0.3


def run(rows: Rows, name: str) -> None:
    """A row for each way, forward, then forward and backward; `name` is channels of a head and window."""
    exact_products()
    head_dim, window = (int(part) for part in name.split("-"))
    heads = 16 if head_dim == 80 else 12
    for trains in (False, True):
        setting = Setting(name, heads, head_dim, window, trains)
        if IS_REHEARSAL:
            setting = Setting(name, 1, 32, min(window, 2), trains, grid=3)
        case = workload(DEVICE, setting=setting, with_peers=not IS_REHEARSAL)
        facts = {"setting": name, "direction": "forward, backward" if trains else "forward"}
        for way, reason in case.skipped.items():
            rows.write(**facts, provider=way, skipped=reason)
        for way in (*case.ceilings, *case.providers):
            attempt(rows, partial(measure, case, way), **facts, provider=way)
        del case
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def measure(case: Workload, way: str) -> dict[str, Any]:
    """Checks a way, then times it; a ceiling computes less, so there is nothing to check."""
    call = case.providers.get(way) or case.ceilings[way]
    fault = case.wrong(call()) if way in case.providers else None
    if fault:
        return {"wrong": fault}
    found = timed(call, SECONDS)
    best = found.get("ms", found["eager_ms"])
    memory = peak_bytes(call)
    return {**found, "TFLOP/s": 1e-9 * case.flops / best} | (
        {"peak_bytes": memory} if memory is not None else {}
    )
