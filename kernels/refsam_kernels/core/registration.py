"""Registers an operator: forward and backward as opaque custom operators that choose their backend late.

How to add an operator (`scaled_sum` stands for its name). In `refsam_kernels/scaled_sum/`:

`op.py`::

    operator = Operator("scaled_sum")

    @operator.forward       # the schema and the fake: outputs of the right shape, dtype, strides
    def _forward(x: Tensor, weight: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty(x.shape[0])

    @operator.backward
    def _backward(
        grad: Tensor, x: Tensor, weight: Tensor, statistic: Tensor, scale: float,
        needs: list[bool], backend: str,
    ) -> tuple[Tensor, Tensor]:
        return empty_gradients((x, weight), needs)

    def _save(ctx, inputs, output):                 # ctx.backend is set already
        x, weight, ctx.scale, _ = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    def _gradients(ctx, grad, _):
        needs = list(ctx.needs_input_grad[:2])
        gradients = _backward(grad, *ctx.saved_tensors, ctx.scale, needs, ctx.backend)
        return *drop_skipped(gradients, needs), None, None

    operator.differentiate(_save, _gradients)

    def scaled_sum(x, weight, *, scale: float, backend: str | None = None) -> Tensor:
        ...                                         # check the arguments, autocast, then
        return _forward(x, weight, scale, backend or "")[0]

`reference.py`, `fallback.py`, ...: `forward` and `backward` with the same arguments less `backend`
(see `dispatch`). What the forward saves must mean the same in every backend: the backward may run
in another one. Plain autograd is off below a custom operator; `gradients_by_vjp` takes a backward
from the forward's formula. Outputs must be new memory, contiguous as the fake says. Arguments have
no defaults. Then name the public function in `refsam_kernels/__init__.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_autograd, register_fake

from refsam_kernels.core.dispatch import Dispatcher, requested_backend

NAMESPACE = "refsam_kernels"
# Not `torch.library.custom_op`: its first call imports torch._dynamo, which takes seconds.
LIBRARY = Library(NAMESPACE, "FRAGMENT")


class Operator:
    """One operator `refsam_kernels::<name>` and its backward `refsam_kernels::<name>_backward`.

    Its backends are modules of `package`, `refsam_kernels.<name>` if not given.
    """

    def __init__(self, name: str, package: str | None = None) -> None:
        self.name = name
        self.dispatcher = Dispatcher(name, package)

    def forward(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Registers the forward and returns it.

        The decorated function gives the schema and is the fake; its last argument is `backend`.
        """
        return self._register(self.name, "forward", fake)

    def backward(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Registers the backward in the same way; its own derivative raises `RuntimeError`."""
        backward = self._register(f"{self.name}_backward", "backward", fake)

        def refuse(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(f"{NAMESPACE}::{self.name}: second derivatives are not supported")

        register_autograd(f"{NAMESPACE}::{self.name}_backward", refuse, lib=LIBRARY)
        return backward

    def further(self, function: str, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Registers `refsam_kernels::<name>_<function>`, which backends hold as `function`; without a derivative."""
        return self._register(f"{self.name}_{function}", function, fake)

    def _register(self, name: str, direction: str, fake: Callable[..., Any]) -> Any:
        def implementation(*arguments: Any) -> Any:
            return self.dispatcher.run(direction, arguments[:-1], arguments[-1])

        LIBRARY.define(name + infer_schema(fake, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def differentiate(self, save: Callable[..., None], gradients: Callable[..., Any]) -> None:
        """Registers the derivative by `save(ctx, inputs, output)` and `gradients(ctx, *grads)`.

        They are what `torch.library.register_autograd` calls `setup_context` and `backward`.
        `ctx.backend` is the backend that the caller asked for by name, or "": the backward can run
        on another thread, or after a `use_backend` block, and still keeps to it. The gradient of an
        output that nothing was made of is None, not of all outputs at once.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.backend = requested_backend(self.name, inputs[-1])
            ctx.set_materialize_grads(False)  # else autograd makes zeros for all that is saved
            save(ctx, inputs, output)

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return gradients(ctx, *grads)

        name = f"{NAMESPACE}::{self.name}"
        register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient with respect to any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or in its place one without elements, since an operator cannot return None."""
    return like.new_empty(0) if tensor is None else tensor


def or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """The gradient that autograd gives for an output, or, where it gives none, zeros of the shape and dtype of `like`."""
    return torch.zeros_like(like) if grad is None else grad


def empty_gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised contiguous gradients; of a tensor that is None or not in need, one without elements."""
    first = next(tensor for tensor in tensors if tensor is not None)
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and need else first.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    )


def drop_skipped(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients as autograd wants them: None for those that were not needed."""
    pairs = zip(gradients, needs, strict=True)
    return tuple(gradient if need else None for gradient, need in pairs)


def gradients_by_vjp(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Gradients of `formula(*inputs)` as a backward operator returns them.

    `grads` are those of the formula's first outputs; what it returns beyond them plays no part.
    The result has one tensor per input, contiguous, in memory of its own, in the input's dtype,
    without elements where `needs` is False. It works inside a custom operator, where plain autograd
    records nothing.
    """
    wanted = {i: t for i, t in enumerate(inputs) if needs[i] and t is not None}
    results = list(empty_gradients(inputs, [False] * len(inputs)))
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
    """Where the tensor's storage begins: the same for tensors that share memory."""
    return tensor.untyped_storage().data_ptr()
