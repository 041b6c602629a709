"""One operator's cases by graph replay, every backend against what one would write without it (`benchmarks.ops`)."""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu_report.inputs import problems_of
from benchmarks.gpu_report.machine import DEVICE, IS_REHEARSAL, attempt, timed
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products
from benchmarks.registry import Workload, load_cases

SECONDS = 0.1


def run(rows: Rows, operator: str) -> None:
    """A row for each case and provider; in a rehearsal the smoke stage's small problems, the fallback alone."""
    exact_products()
    if IS_REHEARSAL:
        for problem in problems_of(operator, DEVICE):
            call = partial(problem.function, backend="fallback", **problem.tensors)
            facts = {"operator": operator, "case": problem.name, "provider": "fallback"}
            attempt(rows, partial(timed, call, SECONDS), **facts)
        return
    for case in load_cases([operator], DEVICE):
        workload = case.make(DEVICE)
        facts = {"operator": operator, "case": case.name}
        for name in workload.providers:
            attempt(rows, partial(measure, workload, name), **facts, provider=name)
        del workload
        torch.cuda.empty_cache()


def measure(workload: Workload, name: str) -> dict[str, Any]:
    """Checks a provider, then times it."""
    fault = workload.wrong(workload.providers[name]())
    return {"wrong": fault} if fault else timed(workload.providers[name], SECONDS)
