"""Runs cases: checks every provider, times them in turn, checks again, and gives one row per provider."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.measure import Ceiling, Times, peak_memory, replays_of, time_interleaved
from benchmarks.registry import Case, Workload


def run_case(case: Case, device: str, ceiling: Ceiling, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one case, as JSON takes them; a provider with a wrong result has `wrong` and no times."""
    workload = case.make(device)
    before = check(workload, workload.providers)
    good = {name: run for name, run in workload.providers.items() if before[name] is None}
    timed = good | workload.ceilings
    memory = {name: peak_memory(run, device) for name, run in timed.items()}
    times = time_interleaved(timed, device, seconds)
    eager: dict[str, Times] = {}
    if device == "cuda":  # Python takes longer than most kernels: a replay is the kernels' time
        replays, eager = replays_of(timed), times
        times = times | (time_interleaved(replays, device, seconds) if replays else {})
    after = check(workload, good)
    for name in (*workload.providers, *workload.ceilings, *workload.skipped):
        row: dict[str, Any] = {"operator": case.operator, "case": case.name}
        row |= {"provider": name, "device": device, "shapes": workload.shapes}
        row |= {"is_ceiling": True} if name in workload.ceilings else {}
        if name in workload.skipped:
            yield row | {"skipped": workload.skipped[name]}
            continue
        wrong = before.get(name) or after.get(name)
        if wrong:
            yield row | {"wrong": wrong}
            continue
        row |= asdict(times[name]) | {"peak_memory_bytes": memory[name]}
        row |= {"eager_ms": eager[name].median_ms} if eager else {}
        measured = {name: times[name] for name in workload.ceilings}
        yield row | compare(workload, times[name], times.get(case.baseline), ceiling, measured)


def check(workload: Workload, providers: dict[str, Any]) -> dict[str, str | None]:
    """The error of each provider's result, None if it is right."""
    return {name: workload.wrong(provider()) for name, provider in providers.items()}


def compare(
    workload: Workload,
    times: Times,
    baseline: Times | None,
    ceiling: Ceiling,
    measured: Mapping[str, Times],
) -> dict[str, Any]:
    """The speed-up over the baseline, and the shares of the machine's limit and of the case's own ceilings."""
    limit = ceiling.milliseconds(workload.moved_bytes, workload.flops, workload.dtype)
    return {
        "speedup": baseline.median_ms / times.median_ms if baseline else None,
        "ceiling_ms": limit,
        "percent_of_ceiling": 100 * limit / times.median_ms,
        "percent_of": {n: 100 * t.median_ms / times.median_ms for n, t in measured.items()},
    }
