"""Measure operators against the same formula with torch's functions, eager, and check both in float64."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Workload, backends_of

Tensors = Mapping[str, Tensor]
Function = Callable[..., Any]  # tensors by name to one tensor or several
# Allowed error, relative to that of the eager formula in the same dtype; as in the tests.
FACTOR = 3
# Allowed in addition, relative to the largest value: a few roundings of results that eager happens to hit exactly.
ROUNDINGS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def against_eager(
    operator: str,
    eager: Function,
    fused: Function,
    inputs: Tensors,
    *,
    flops: int,
    shapes: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    zeros: Mapping[str, str] | None = None,
    with_compiled: bool = False,
) -> Workload:
    """`fused(..., backend=)` by every backend against `eager`, both called with tensors by name.

    Random gradients of the results are taken back to the inputs that require one. `zeros` names inputs whose gradient is
    mathematically zero, each with another whose gradient may be as far off. `with_compiled` adds torch.compile on a GPU.
    """
    device = next(iter(inputs.values())).device.type
    ways: dict[str, Function] = {"eager": eager}
    if with_compiled and device == "cuda":
        ways["compiled eager"] = torch.compile(eager)
    ways |= {name: partial(fused, backend=name) for name in backends_of(operator, device)}
    grads = random_gradients(eager, inputs)
    exact = run(eager, {n: exactly(t) for n, t in inputs.items()}, list(map(exactly, grads)))
    plain = run(eager, inputs, grads)
    bounds = [bound(*pair, dtype) for pair in zip(plain, exact, strict=True)]
    trained = [name for name, tensor in inputs.items() if tensor.requires_grad]
    for zero, other in (zeros or {}).items() if trained else ():
        first = len(bounds) - len(trained)
        bounds[first + trained.index(zero)] = bounds[first + trained.index(other)]
    return Workload(
        providers={name: partial(run, way, inputs, grads) for name, way in ways.items()},
        wrong=partial(further_than, exact=exact, bounds=bounds),
        moved_bytes=sum(tensor.nbytes for tensor in (*inputs.values(), *plain)),
        flops=flops,
        shapes=shapes,
        dtype=dtype,
    )


@torch.no_grad()
def random_gradients(function: Function, inputs: Tensors) -> list[Tensor]:
    """Gradients of a function's results, always the same ones."""
    results = as_tuple(function(**inputs))
    generator = torch.Generator(results[0].device).manual_seed(1)
    draw = partial(torch.randn, generator=generator, device=results[0].device)
    return [draw(result.shape).to(result.dtype) for result in results]


def run(function: Function, inputs: Tensors, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results, then the gradients of the trained inputs; zeros for an input that has no part in them."""
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        results = as_tuple(function(**inputs))
    if not wanted:
        return results
    gradients = torch.autograd.grad(results, wanted, grads, materialize_grads=True)
    return *(result.detach() for result in results), *gradients


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """The results of a function that returns one tensor or several."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def exactly(tensor: Tensor) -> Tensor:
    """The same values in float64; integers and bools stay as they are."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def bound(found: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Largest allowed error of a result."""
    error = float((found.double() - exact).abs().max())
    return FACTOR * error + ROUNDINGS[dtype] * float(exact.abs().max())


def further_than(
    found: tuple[Tensor, ...], *, exact: tuple[Tensor, ...], bounds: list[float]
) -> str | None:
    """Say which result or gradient is too far from the exact one; None if none is."""
    for index, (tensor, wanted, most) in enumerate(zip(found, exact, bounds, strict=True)):
        error = float((tensor.double() - wanted).abs().max())
        if not error <= most:
            return f"result {index} is off by {error:.2e}, at most {most:.2e} may be"
    return None
