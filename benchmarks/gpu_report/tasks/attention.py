"""One attention of SAM alone, forward and with its backward, beside SDPA with and without a bias.

SDPA without a bias, on windows that are cut and padded before the clock starts, is the ceiling.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_report.machine import (
    DEVICE,
    IS_REHEARSAL,
    attempt,
    made,
    timed_and_weighed,
)
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products
from benchmarks.ops.rel_pos_attention import Setting, peers, workload
from benchmarks.registry import Workload

SECONDS = 0.3


def run(rows: Rows, head_dim: str, only: str = "") -> None:
    """A row for each way, global and in windows, forward, then forward and backward; or `only` for "peers"."""
    exact_products()
    # On a CPU, as in a rehearsal, FlexAttention is compiled for minutes.
    of_peers = only == "peers" and not IS_REHEARSAL
    for setting in settings(int(head_dim)):
        facts = {"setting": setting.name}
        facts["direction"] = "forward, backward" if setting.trains else "forward"
        attempt_all(rows, setting, facts, of_peers)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def settings(head_dim: int) -> Iterator[Setting]:
    """A block of ViT-B, or of ViT-H."""
    heads = 16 if head_dim == 80 else 12
    for trains in (False, True):
        for window in (0, 14):
            name = f"{head_dim}-{window}"
            if IS_REHEARSAL:
                yield Setting(name, 1, 32, min(window, 2), trains, grid=3)
            else:
                yield Setting(name, heads, head_dim, window, trains)


def attempt_all(rows: Rows, setting: Setting, facts: dict[str, Any], of_peers: bool) -> None:
    """Rows of one setting."""
    case = made(rows, partial(workload, DEVICE, setting=setting, with_peers=of_peers), **facts)
    if case is None:
        return
    for way, reason in case.skipped.items():
        rows.write(**facts, provider=way, skipped=reason)
    for way in (*case.ceilings, *case.providers):
        if not of_peers or way in peers(setting):
            attempt(rows, partial(measure, case, way), **facts, provider=way)


def measure(case: Workload, way: str) -> dict[str, Any]:
    """Checks a way, then times it; a ceiling computes less, so there is nothing to check."""
    call = case.providers.get(way) or case.ceilings[way]
    fault = case.wrong(call()) if way in case.providers else None
    if fault:
        return {"wrong": fault}
    return timed_and_weighed(call, SECONDS, case.flops)
