"""Gradients of operators: derived from a formula by autograd, and in the form in which a backward operator returns them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def empty_gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised contiguous gradients; of a tensor that is None or not in need, one without elements."""
    first = next(tensor for tensor in tensors if tensor is not None)
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and need else first.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    )


def finished(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients in the tensors' shapes and dtypes, contiguous; as `empty_gradients`, without elements if not needed."""
    first = next(tensor for tensor in tensors if tensor is not None)
    return [
        gradient.reshape(tensor.shape).to(tensor.dtype).contiguous()
        if need and gradient is not None and tensor is not None
        else first.new_empty(0)
        for gradient, tensor, need in zip(gradients, tensors, needs, strict=True)
    ]


def gradients_by_vjp(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of `formula(*inputs)` as a backend's backward returns them.

    `grads` are those of the formula's first outputs; its further outputs are ignored.
    The result has one tensor per input, contiguous, in memory of its own, in the input's dtype, or
    None where `needs` is False. It works inside a custom operator, where plain autograd records nothing.
    """
    wanted = {i: t for i, t in enumerate(inputs) if needs[i] and t is not None}
    results: list[Tensor | None] = [None] * len(inputs)
    if not wanted:
        return tuple(results)
    with recording():
        leaves = {i: tensor.detach().requires_grad_() for i, tensor in wanted.items()}
        outputs = formula(
            *(leaves.get(i, t if t is None else t.detach()) for i, t in enumerate(inputs))
        )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = zip(outputs, grads, strict=False)
        roots = {output: grad for output, grad in pairs if output.requires_grad}
        gradients = torch.autograd.grad(
            list(roots), list(leaves.values()), list(roots.values()), materialize_grads=True
        )
    taken = {memory_of(tensor) for tensor in (*inputs, *grads) if tensor is not None}
    for i, gradient in zip(wanted, gradients, strict=True):
        gradient = gradient.contiguous()
        if memory_of(gradient) in taken:  # the gradient of a plain sum is the incoming one itself
            gradient = gradient.clone()
        taken.add(memory_of(gradient))
        results[i] = gradient
    return tuple(results)


def derived_backward(
    forward: Callable[[Any], Tensor | tuple[Tensor, ...]], *names: str
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backend's backward, derived from its forward: gradients to the inputs' tensors of these names, by `gradients_by_vjp`."""

    def backward(
        inputs: Any, outputs: Any, grads: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        def formula(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            return forward(inputs._replace(**dict(zip(names, tensors, strict=True))))

        return gradients_by_vjp(formula, [getattr(inputs, name) for name in names], needs, grads)

    return backward


@contextmanager
def recording() -> Iterator[None]:
    """Lets autograd record inside a custom operator's implementation, where torch has switched it off.

    `torch.func.vjp` would do without the private names, but breaks there under any dispatch mode:
    under a FLOP counter, selective checkpointing and `opcheck`.
    """
    switched_off = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        switched_off = switched_off - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    switched_on = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(switched_on, switched_off), torch.enable_grad():
        yield


def memory_of(tensor: Tensor) -> int:
    """Address of the tensor's storage: the same for tensors that share memory."""
    return tensor.untyped_storage().data_ptr()
