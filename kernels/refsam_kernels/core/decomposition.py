"""The operators as plain PyTorch, for graphs that must run where this library is not."""

from collections.abc import Callable
from typing import Any

import torch

from refsam_kernels.core.dispatch import Dispatcher
from refsam_kernels.core.registration import NAMESPACE


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every operator's formula, as `torch.export.ExportedProgram.run_decompositions` takes them.

    `program.run_decompositions(decompositions())` leaves no operator of this library in an exported
    program: each is replaced by its `reference`, whose results it has within the stated tolerances.
    Only forwards are in the table: export without autograd.

    Returns:
        Formulas by operator (`torch._ops.OpOverload`); a formula takes the operator's arguments.
    """
    namespace = getattr(torch.ops, NAMESPACE)
    return {
        getattr(namespace, operator).default: _formula(dispatcher)
        for operator, dispatcher in Dispatcher.known.items()
        if hasattr(dispatcher.module("reference"), "forward")
    }


def _formula(dispatcher: Dispatcher) -> Callable[..., Any]:
    """The forward of the operator's reference on all arguments but the last, `backend`."""
    module: Any = dispatcher.module("reference")

    def formula(*arguments: Any) -> Any:
        outputs = module.forward(dispatcher.inputs(*arguments[:-1]))
        return tuple(outputs) if isinstance(outputs, tuple) else outputs

    return formula
