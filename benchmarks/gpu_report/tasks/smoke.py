"""Every backend of one operator once: forward and backward at ViT-B's size, in float32 and bfloat16, against float64.

Memory that is asked for is filled with NaN before it is written, and so are the inputs that nothing may read.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_report import machine
from benchmarks.gpu_report.inputs import Problem, problems_of
from benchmarks.gpu_report.machine import DEVICE, attempt, first_line
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products
from benchmarks.ops._eager import as_tuple
from benchmarks.registry import backends_of
from refsam_kernels.core.dispatch import Dispatcher

# As in the tests: three times the error of the plain formula in the same dtype, and some roundings of the largest value.
FACTOR = 3
ROUNDINGS = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2}
DTYPES = (torch.float32, torch.bfloat16)
AUTOMATIC = "automatic"  # the backend that a call without `backend=` gets


def run(rows: Rows, operator: str, *only: str) -> None:
    """A row for each problem, dtype and backend; `only` some backends, "automatic" among them."""
    exact_products()
    # PyTorch then fills the memory that it gives out, libraries' too.
    torch.use_deterministic_algorithms(True, warn_only=True)
    there = [*backends_of(operator, DEVICE, with_reference=True), AUTOMATIC]
    for name in (name for name in only if name not in there):
        reasons = Dispatcher.known[operator].environment_reasons(name, DEVICE)
        rows.write(operator=operator, backend=name, skipped="; ".join(reasons))
    for problem in problems_of(operator, DEVICE):
        for dtype in problem.dtypes or DTYPES:
            exact = run_problem(problem, torch.float64, dtype, "reference")
            try:
                with wholly_in_one_dtype():
                    plain = run_problem(problem, dtype, dtype, "reference")
            except Exception as error:
                plain = exact
                print(f"{problem.name}, {dtype}: the formula itself: {first_line(error)}")
            for name in there:
                if name == "reference" or (only and name not in only):
                    continue
                facts = {"operator": operator, "problem": problem.name, "dtype": name_of(dtype)}
                backend = "" if name == AUTOMATIC else name
                measure = partial(compare, problem, dtype, backend, exact, plain)
                attempt(rows, measure, **facts, backend=name)


def wholly_in_one_dtype() -> Any:
    """The reference then computes sums in the dtype of its inputs, as the plain formula does."""
    return mock.patch.object(torch, "promote_types", lambda first, second: first)


def without_wrong_products(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """In a rehearsal Triton runs no backward in bfloat16: its interpreter would multiply the bit patterns."""
    is_wrong = machine.IS_REHEARSAL and dtype == torch.bfloat16
    hidden = {"TRITON_INTERPRET": "0"} if is_wrong else {}
    return mock.patch.dict(os.environ, hidden)


def name_of(dtype: torch.dtype) -> str:
    """The dtype without its package: "float32"."""
    return str(dtype).removeprefix("torch.")


def run_problem(
    problem: Problem, dtype: torch.dtype, rounded: torch.dtype, backend: str
) -> dict[str, Tensor]:
    """Outputs and gradients by name, of inputs rounded to one dtype and computed in another."""
    tensors = {
        name: x.to(rounded).to(dtype) if x.is_floating_point() else x.clone()
        for name, x in problem.tensors.items()
    }
    trained = [name for name in problem.trained if name in tensors]
    for name in trained:
        tensors[name].requires_grad_()
    results = as_tuple(problem.function(backend=backend or None, **tensors))
    found = {f"output {index}": x.detach() for index, x in enumerate(results)}
    if not trained:
        return found
    weights = (problem.weight_of(x) for x in results)
    loss = sum(((x * w.to(x.dtype)).sum() for x, w in zip(results, weights, strict=True)))
    gradients = torch.autograd.grad(loss, [tensors[name] for name in trained])  # type: ignore[arg-type]
    return found | {f"gradient of {name}": x for name, x in zip(trained, gradients, strict=True)}


def compare(
    problem: Problem,
    dtype: torch.dtype,
    backend: str,
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
) -> dict[str, Any]:
    """The largest relative errors, and `wrong` with those that are too large; `skipped` if the backend cannot run."""
    if reason := problem.refusal(dtype, backend):
        return {"skipped": reason}
    with without_wrong_products(dtype):
        found = run_problem(problem, dtype, dtype, backend)
    faults = list(faults_of(problem, dtype, found, exact, plain))
    errors = {name: relative(x, exact[name]) for name, x in found.items()}
    worst = max(errors, key=lambda name: errors[name])
    row = {"error": errors["output 0"], "largest_error": errors[worst], "of": worst}
    return row | ({"wrong": "; ".join(faults)[:300]} if faults else {})


def faults_of(
    problem: Problem,
    dtype: torch.dtype,
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
) -> Iterator[str]:
    """In words each result that is too far from the exact one."""
    for name, wanted in exact.items():
        if wanted.dtype == torch.bool:
            share = float((found[name] != wanted).double().mean())
            if share > problem.undecided:
                yield f"{name}: {share:.1e} of the pixels differ"
            continue
        size = exact.get(f"gradient of {problem.zero.get(name, '')}", wanted)
        error, eager = (float((x[name].double() - wanted).abs().max()) for x in (found, plain))
        bound = FACTOR * eager + ROUNDINGS[dtype] * float(size.abs().max())
        if not error <= bound:
            yield f"{name}: off by {error:.1e}, at most {bound:.1e} may be"


def relative(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of the exact result."""
    if wanted.dtype == torch.bool:
        return float((found != wanted).double().mean())
    difference = (found.double() - wanted).norm()
    return float(difference / wanted.norm().clamp(min=1e-30))
