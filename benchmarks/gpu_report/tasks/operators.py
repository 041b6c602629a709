"""The cases of operators by graph replay, every backend against the code that one would write without it (`benchmarks.ops`)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_report.inputs import problems_of
from benchmarks.gpu_report.machine import DEVICE, IS_REHEARSAL, attempt, made, timed
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products
from benchmarks.registry import Workload, load_cases

SECONDS = 0.1


def run(rows: Rows, *operators: str) -> None:
    """A row for each case and provider; in a rehearsal the smoke stage's small problems, the fallback alone."""
    exact_products()
    if IS_REHEARSAL:
        rehearse(rows, operators)
        return
    for case in load_cases([*operators], DEVICE):
        facts = {"operator": case.operator, "case": case.name}
        workload = made(rows, partial(case.make, DEVICE), **facts)
        if workload is None:
            continue
        for name in workload.providers:
            attempt(rows, partial(measure, workload, name), **facts, provider=name)
        del workload
        torch.cuda.empty_cache()


def rehearse(rows: Rows, operators: Sequence[str]) -> None:
    """A row for each of the operators' small problems."""
    for operator in operators:
        for problem in problems_of(operator, DEVICE):
            call = partial(problem.function, backend="fallback", **problem.tensors)
            facts = {"operator": operator, "case": problem.name, "provider": "fallback"}
            attempt(rows, partial(timed, call, SECONDS), **facts)


def measure(workload: Workload, name: str) -> dict[str, Any]:
    """Checks a provider, then times it."""
    fault = workload.wrong(workload.providers[name]())
    return {"wrong": fault} if fault else timed(workload.providers[name], SECONDS)
