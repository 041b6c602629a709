"""Lists the backends that would run on this machine, and why others would not: `python -m refsam_kernels.info`."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from refsam_kernels.build import PACKAGE, read_report
from refsam_kernels.core.dispatch import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    Dispatcher,
    requested_backend,
)
from refsam_kernels.core.output import print_all


def describe() -> str:
    """Versions, compiled libraries, devices, and each operator's backend per device, as text.

    Raises `BackendError` if REFSAM_BACKEND names an unknown operator or backend.
    """
    lines = [*versions(), *libraries(), *environment()]
    for device_type in device_types():
        lines.append(f"on {device_type} tensors")
        for name in sorted(Dispatcher.known):
            lines.extend(f"  {line}" for line in choice(Dispatcher.known[name], device_type))
    return "\n".join(lines)


def versions() -> Iterator[str]:
    """Versions of Python, torch and Triton."""
    yield f"Python {platform.python_version()}, {platform.machine()}, {platform.system()}"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield f"torch {torch.__version__} ({cuda}, {torch.get_num_threads()} threads)"
    try:
        yield f"triton {version('triton')}"
    except PackageNotFoundError:
        yield "triton is not installed"


def libraries(folder: Path = PACKAGE) -> Iterator[str]:
    """The libraries that were built, with their toolchain, or the reasons they were skipped: the build report in `folder`."""
    entries = read_report(folder)
    if not entries:
        yield "no library was built: run python -m refsam_kernels.build"
    for name, entry in sorted(entries.items()):
        if entry.get("built"):
            facts = (
                f"{key} {value}" for key, value in entry.items() if key not in ("built", "sources")
            )
            yield f"{name}: built ({', '.join(facts)})"
        else:
            yield f"{name}: left out, {entry.get('reason', 'no reason given')}"


def environment() -> Iterator[str]:
    """The environment variable's value, and the GPUs."""
    yield f"{ENVIRONMENT_VARIABLE}: {os.environ.get(ENVIRONMENT_VARIABLE) or 'not set'}"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}: {torch.cuda.get_device_name(index)}, capability {major}.{minor}"


def device_types() -> list[str]:
    """The kinds of device that tensors can lie on here, among those that a backend is made for."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def choice(dispatcher: Dispatcher, device_type: str) -> Iterator[str]:
    """The backend that an operator would choose on such a device, then why not each of the others.

    The choice is made per call: arguments can still rule out a backend by dtype or size.
    """
    reasons = {name: dispatcher.environment_reasons(name, device_type) for name in BACKENDS}
    wanted = requested_backend(dispatcher.operator)
    possible = [
        name for name, backend in BACKENDS.items() if backend.automatic and not reasons[name]
    ]
    chosen = wanted or next(iter(possible), "none")
    impossible = bool(wanted and reasons[wanted])
    yield f"{dispatcher.operator}: {chosen}{' (asked for, but cannot run)' if impossible else ''}"
    for name, explanation in reasons.items():
        if explanation:
            yield f"  not {name}: {'; '.join(explanation)}"
        elif name != chosen:
            yield f"  not {name}: {why_not_first(name, wanted)}"


def why_not_first(name: str, wanted: str) -> str:
    """Why a backend that could run is not the one that runs."""
    if wanted:
        return f"{wanted} was asked for"
    return "comes later in the order" if BACKENDS[name].automatic else "runs only when asked for"


if __name__ == "__main__":
    print_all(describe())
