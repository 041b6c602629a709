"""What is measured: cases, each of which makes its inputs and names the ways to compute its result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from refsam_kernels.dispatch import BACKENDS, Dispatcher

Provider = Callable[[], Any]  # one tensor, or several


@dataclass(frozen=True)
class Workload:
    """A case on one device, its inputs already there: providers take no arguments, so that only the operator is timed.

    `wrong` says in words what is wrong with a result, or None. `moved_bytes` and `flops` are what any implementation
    must read and write, and compute: they give the time that no implementation can beat. `ceilings` do less than what is
    asked for: they are timed, not checked.
    """

    providers: dict[str, Provider]
    wrong: Callable[[Any], str | None]
    moved_bytes: int
    flops: int
    shapes: dict[str, Any]
    ceilings: dict[str, Provider] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One input of one operator; `baseline` is the provider that speed-ups refer to."""

    operator: str
    name: str
    baseline: str
    make: Callable[[str], Workload]


CASES: dict[str, Case] = {}


def register(
    operator: str, name: str, baseline: str
) -> Callable[[Callable[[str], Workload]], Callable[[str], Workload]]:
    """Registers a function from a device ("cpu", "cuda") to a workload as a case."""

    def add(make: Callable[[str], Workload]) -> Callable[[str], Workload]:
        CASES[f"{operator}/{name}"] = Case(operator, name, baseline, make)
        return make

    return add


def load_cases(wanted: list[str]) -> list[Case]:
    """The cases of the operators that are wanted, of all if none is named; raises `ValueError` for an unknown name."""
    known = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[!_]*.py"))
    for name in wanted or known:
        if name not in known:
            raise ValueError(f"operator: got {name!r}, wanted one of {', '.join(known)}")
        import_module(f"benchmarks.ops.{name}")
    return [case for case in CASES.values() if not wanted or case.operator in wanted]


def backends_of(operator: str, device: str) -> Iterator[str]:
    """The backends of an operator that can run on a device here."""
    dispatcher = Dispatcher.known[operator]
    return (name for name in BACKENDS if not dispatcher.environment_reasons(name, device))
