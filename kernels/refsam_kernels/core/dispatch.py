"""Chooses the backend that runs an operator.

A backend of an operator is a module of the operator's folder with the backend's name
(`fallback.py`, `triton.py`, ...). It holds

    forward(inputs)             # the bundle of the operator's arguments (see `registration`)
    backward(inputs, outputs, grads, needs)     # optional: without it other backends run it, even if this one was named
    not_supported_reasons(inputs) -> list[str]  # optional: why it cannot run these, forward or backward (see `reasons`)
    backward_not_supported_reasons(inputs) -> list[str]    # optional: takes its place for the backward

and is imported when it is first considered for tensors of a device that it supports, never before. A
module that cannot work on this machine (a library that was not built) raises `ImportError` with the
reason when it is imported.

The first of these decides: the argument `backend=`, the context manager `use_backend`,
the environment variable `REFSAM_BACKEND`, the static order of `BACKENDS`. A requested backend
that cannot run is a `BackendError` with every reason; an automatic choice takes the next one
and logs that once. On a GPU the rules of `order` go before the static order. `reference` is never chosen automatically.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar

import torch

from refsam_kernels.core import libraries
from refsam_kernels.core.order import first_tensor, order_of

logger = logging.getLogger("refsam_kernels")

ENVIRONMENT_VARIABLE = "REFSAM_BACKEND"
NO_BACKWARD = "has no backward"  # not an error: other backends run it


class BackendError(ValueError):
    """A requested backend is unknown, or cannot run the operator on these arguments."""


@dataclass(frozen=True)
class Backend:
    """A way to run operators: the devices it supports, any if none is named, and the package it needs beside torch."""

    name: str
    devices: tuple[str, ...] = ()
    package: str | None = None
    automatic: bool = True

    def supports(self, device_type: str) -> bool:
        """Whether it works on tensors of this device; Triton's interpreter and the emulator of CUDA work on the CPU's."""
        if self.package == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return True
        if self.name == "cuda" and libraries.cuda_is_emulated():
            return device_type == "cpu"
        return not self.devices or device_type in self.devices


BACKENDS = {
    backend.name: backend
    for backend in (
        # Triton supports every operator, so it is preferred; `order` has the exceptions.
        Backend("triton", devices=("cuda",), package="triton"),
        Backend("cuda", devices=("cuda",)),
        Backend("cpu", devices=("cpu",)),
        Backend("fallback"),
        Backend("reference", automatic=False),
    )
}


class Dispatcher:
    """Finds, imports and chooses the backends of one operator.

    `operator` is its name, `inputs` the class of its arguments' bundle and `package` the import path of its folder,
    `refsam_kernels.<operator>` if not given.
    """

    known: ClassVar[dict[str, "Dispatcher"]] = {}

    def __init__(self, operator: str, inputs: Any, package: str | None = None) -> None:
        self.operator, self.inputs = operator, inputs
        self.package = package or f"{__package__.rpartition('.')[0]}.{operator}"
        self._exists: dict[str, bool] = {}
        self._modules: dict[str, ModuleType | str] = {}
        self._broken: set[str] = set()
        self._logged: set[tuple[str, str]] = set()
        Dispatcher.known[operator] = self

    def module(self, name: str) -> ModuleType | str:
        """The backend's module, imported on first use, or in words why there is none."""
        if name not in self._modules:
            self._modules[name] = self._import(name)
        return self._modules[name]

    def exists(self, name: str) -> bool:
        """Whether the operator has such a backend at all; nothing is imported."""
        if name not in self._exists:
            self._exists[name] = importlib.util.find_spec(f"{self.package}.{name}") is not None
        return self._exists[name]

    def _import(self, name: str) -> ModuleType | str:
        try:
            return importlib.import_module(f"{self.package}.{name}")
        except (ImportError, OSError) as error:
            # A library that was not built is an ImportError; one that is there and cannot be loaded is a fault.
            if not isinstance(error, ImportError):
                self._broken.add(name)
            return f"cannot be imported: {error}"

    def environment_reasons(self, name: str, device_type: str) -> list[str]:
        """Why the backend cannot run anything on such a device here; empty if it can."""
        backend = BACKENDS[name]
        if not self.exists(name):
            return [f"{self.operator} has no {name} backend"]
        if not backend.supports(device_type):
            return [f"needs {' or '.join(backend.devices)} tensors, got {device_type}"]
        if backend.package is not None and not is_installed(backend.package):
            return [f"{backend.package} is not installed"]
        module = self.module(name)
        return [module] if isinstance(module, str) else []

    def not_supported_reasons(
        self, name: str, direction: str, arguments: Sequence[Any]
    ) -> list[str]:
        """Why the backend cannot run `direction`, "forward" or "backward", on these; empty if it can."""
        reasons = self.environment_reasons(name, device_of(arguments).type)
        if reasons:
            return reasons
        module = self.module(name)
        if not hasattr(module, direction):
            return [f"has no {direction}"]
        prefix = "" if direction == "forward" else f"{direction}_"
        explain = getattr(module, f"{prefix}not_supported_reasons", None)
        if explain is None and direction == "backward":
            explain = getattr(module, "not_supported_reasons", None)
        return explain(arguments[0]) if explain is not None else []

    def choose(self, direction: str, arguments: Sequence[Any], backend: str = "") -> str:
        """The name of the backend that runs `direction` on these arguments.

        `backend` is the caller's request, "" for none. Raises `BackendError` if none can run.
        """
        name = requested_backend(self.operator, backend)
        if name:
            reasons = self.not_supported_reasons(name, direction, arguments)
            if not reasons:
                return name
            if reasons != [NO_BACKWARD]:
                explanation = "; ".join(reasons)
                raise BackendError(f"{self.operator}: backend {name!r} cannot run: {explanation}")
        refusals = []
        for chosen in order_of(self.operator, direction, arguments[0], tuple(BACKENDS)):
            candidate = BACKENDS[chosen]
            if not candidate.automatic or not self.exists(candidate.name):
                continue
            reasons = self.not_supported_reasons(candidate.name, direction, arguments)
            if not reasons:
                return candidate.name
            refusals.append(f"{candidate.name}: {'; '.join(reasons)}")
            if reasons != [NO_BACKWARD]:
                self._log_fall_back(candidate, device_of(arguments).type, reasons)
        explanation = ". ".join(refusals) or "it has none that is chosen automatically"
        raise BackendError(f"{self.operator}: no backend can run: {explanation}")

    def _log_fall_back(self, backend: Backend, device_type: str, reasons: list[str]) -> None:
        """Logs once that a backend for this device was passed over.

        It is a warning if it could run other arguments, or if its library was built and cannot be loaded.
        """
        message = "; ".join(reasons)
        if not backend.supports(device_type) or (backend.name, message) in self._logged:
            return
        self._logged.add((backend.name, message))
        unavailable = bool(self.environment_reasons(backend.name, device_type))
        is_expected = unavailable and backend.name not in self._broken
        level = logging.INFO if is_expected else logging.WARNING
        logger.log(level, "%s falls back from %s: %s", self.operator, backend.name, message)

    def run(self, direction: str, arguments: Sequence[Any], backend: str = "") -> Any:
        """Runs `direction` with the chosen backend.

        Autocast is off inside: the public function has cast already. The tensors' GPU is made the
        current one, since Triton launches there.
        """
        module = self.module(self.choose(direction, arguments, backend))
        device = device_of(arguments)
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if torch.is_autocast_enabled(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            return getattr(module, direction)(*arguments)


def device_of(arguments: Sequence[Any]) -> torch.device:
    """The device of the first tensor of the bundle, which comes first."""
    return first_tensor(arguments[0]).device


@lru_cache
def is_installed(package: str) -> bool:
    """Whether a package could be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


_requests: ContextVar[tuple[Mapping[str, str], ...]] = ContextVar("requested_backends", default=())


@contextmanager
def use_backend(request: str) -> Iterator[None]:
    """Uses these backends within a `with` block of this thread: "fallback", or
    "rel_pos_attention=triton,mask_loss=reference".

    An inner block overrides an outer one for the operators that it names. Operators that ran inside use the same
    backend for their backward, also after the block. Raises `BackendError` for an unknown
    backend or operator.
    """
    token = _requests.set((parse_request(request, "use_backend"), *_requests.get()))
    try:
        yield
    finally:
        _requests.reset(token)


def requested_backend(operator: str, argument: str = "") -> str:
    """The requested backend, or "": argument, then `use_backend`, then environment."""
    if argument:
        check_backend(argument, "backend")
        return argument
    environment = parse_request(os.environ.get(ENVIRONMENT_VARIABLE, ""), ENVIRONMENT_VARIABLE)
    for request in (*_requests.get(), environment):
        name = request.get(operator) or request.get("")
        if name:
            return name
    return ""


@lru_cache
def parse_request(text: str, source: str) -> Mapping[str, str]:
    """Reads "name" or "operator=name,...": backends by operator, "" standing for every other one.

    `source` says in errors where the text comes from. Raises `BackendError` for an unknown name.
    """
    request = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        operator, _, name = item.rpartition("=")
        if operator and operator not in Dispatcher.known:
            known = ", ".join(sorted(Dispatcher.known))
            raise BackendError(f"{source}: got the operator {operator!r}, wanted one of {known}")
        check_backend(name, source)
        request[operator] = name
    return request


def check_backend(name: str, source: str) -> None:
    """Raises `BackendError` unless there is such a backend; `source` says where the name comes from."""
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise BackendError(f"{source}: got the backend {name!r}, wanted one of {known}")
