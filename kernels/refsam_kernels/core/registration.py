"""Registers an operator: forward and backward as opaque custom operators that choose their backend late.

How to add an operator (`scaled_sum` stands for its name). In `refsam_kernels/scaled_sum/`:

`inputs.py`, the only place that lists the arguments::

    class Inputs(NamedTuple):           # tensors first, then settings; no defaults
        x: Tensor
        weight: Tensor
        scale: float
        keep: bool                      # optional: whether a backward will follow; False in a backward

    class Outputs(NamedTuple):          # `Tensor` instead, if there is one output
        sum: Tensor
        statistic: Tensor

`op.py`::

    operator = Operator("scaled_sum", Inputs, Outputs)

    @operator.forward                   # the fake: outputs of the right shape, dtype, strides
    def _forward(inputs: Inputs) -> Outputs:
        return Outputs(torch.empty_like(inputs.x), inputs.x.new_empty(len(inputs.x)))

    operator.differentiate({"grad": "sum"}, saved=["statistic"])

    def scaled_sum(x, weight, *, scale: float, backend: str | None = None) -> Tensor:
        ...                             # autocast, check the arguments, then
        return _forward(*Inputs(x, weight, scale, needs_gradient(x, weight)), backend or "")[0]

The schemas follow from the bundles: the forward takes the fields of `Inputs` and `backend`; the backward takes the gradients, the
tensors of `Inputs`, the saved outputs, the settings, `needs` and `backend`.

`reference.py`, `fallback.py`, ... (see `dispatch`)::

    def forward(inputs: Inputs) -> Outputs: ...
    def backward(inputs: Inputs, outputs: Outputs, grads: Sequence[Tensor], needs: Sequence[bool]) -> Sequence[Tensor | None]: ...

`outputs` holds what was saved, None elsewhere. The backward returns one gradient per differentiable tensor; those that `needs`
does not ask for are ignored and may be None, the others get the tensor's shape and dtype (`gradients.finished`). Saved outputs
must mean the same in every backend: the backward may run in another one. Plain autograd is off below a custom operator;
`gradients.derived_backward` makes a backward of a forward. Outputs must be new memory, contiguous as the fake says. Then name the
public function in `refsam_kernels/__init__.py`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, infer_schema, register_autograd, register_fake

from refsam_kernels.core.dispatch import Dispatcher, requested_backend
from refsam_kernels.core.gradients import empty_gradients, finished
from refsam_kernels.core.transforms import is_transformed

NAMESPACE = "refsam_kernels"
# Not `torch.library.custom_op`: its first call imports torch._dynamo, which takes seconds.
LIBRARY = Library(NAMESPACE, "FRAGMENT")
# The setting that asks the forward to save what a backward needs.
KEEP = "keep"


class Operator:
    """One operator `refsam_kernels::<name>` and its backward `refsam_kernels::<name>_backward`.

    `inputs` is the NamedTuple class of its arguments, `outputs` that of its results, or Tensor. Its backends are modules of
    `package`, `refsam_kernels.<name>` if not given.
    """

    def __init__(
        self, name: str, inputs: Any, outputs: Any = Tensor, package: str | None = None
    ) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.dispatcher = Dispatcher(name, inputs, package)
        self.is_differentiable = False
        self.derivative: _Derivative
        self.fake: Callable[[Any], Any]

    def forward(self, fake: Callable[[Any], Any]) -> Callable[..., Any]:
        """Registers the forward and returns it; `fake(inputs)` gives uninitialised outputs."""
        self.fake = fake
        operator = self._of_bundle(self.name, "forward", self.inputs, self.outputs, fake)
        return refusing_transforms(self, operator)

    def register(
        self, function: str, inputs: Any, outputs: Any, fake: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        """Registers `refsam_kernels::<name>_<function>` without a derivative; backends hold it as `function`."""
        return self._of_bundle(f"{self.name}_{function}", function, inputs, outputs, fake)

    def _of_bundle(
        self, name: str, function: str, inputs: Any, outputs: Any, fake: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        is_single = outputs is Tensor
        returns = Tensor if is_single else tuple[(Tensor,) * len(outputs._fields)]  # type: ignore[misc]

        def bundle(*values: Any) -> tuple[Any]:
            return (inputs(*values),)

        def plain(result: Any, inputs: Any) -> Any:
            return result if is_single else tuple(result)

        return self._define(name, function, get_type_hints(inputs), returns, bundle, fake, plain)

    def _define(
        self,
        name: str,
        function: str,
        parameters: Mapping[str, Any],
        returns: Any,
        bundle: Callable[..., tuple[Any, ...]],
        fake: Callable[..., Any],
        plain: Callable[..., Any],
    ) -> Callable[..., Any]:
        """Defines an operator with these parameters, by their types, and `backend`.

        `bundle` makes the arguments of a backend of the values, `plain` the operator's result of a backend's and its arguments.
        """

        def implementation(*values: Any) -> Any:
            arguments = bundle(*values[:-1])
            return plain(self.dispatcher.run(function, arguments, values[-1]), *arguments)

        def fake_implementation(*values: Any) -> Any:
            arguments = bundle(*values[:-1])
            return plain(fake(*arguments), *arguments)

        schema = infer_schema(signed({**parameters, "backend": str}, returns), mutates_args=())
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        register_fake(f"{NAMESPACE}::{name}", fake_implementation, lib=LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def differentiate(
        self,
        grads: Mapping[str, str],
        *,
        saved: Sequence[str] = (),
        frozen: Sequence[str] = (),
        as_tuple: bool = False,
    ) -> None:
        """Registers the backward and the derivative; the derivative of the backward raises `RuntimeError`.

        Args:
            grads: the backward's names of gradients, each with the output whose gradient it is.
            saved: outputs that the backward takes.
            frozen: tensors of the inputs that get no gradient.
            as_tuple: whether the schema returns a tuple of gradients instead of a list.
        """
        self.is_differentiable = True
        self.derivative = derivative = _Derivative(self, grads, saved, frozen)
        returns: Any = list[Tensor]
        if derivative.is_single:
            returns = Tensor
        elif as_tuple:
            returns = tuple[(Tensor,) * len(derivative.wanted)]  # type: ignore[misc]
        kind = itemgetter(0) if derivative.is_single else tuple if as_tuple else list

        def plain(gradients: Any, inputs: Any, outputs: Any, grads: Any, needs: Any) -> Any:
            return kind(finished(gradients, derivative.tensors_of(inputs), needs))

        derivative.backward = self._define(
            f"{self.name}_backward",
            "backward",
            derivative.parameters,
            returns,
            derivative.bundle,
            derivative.fake,
            plain,
        )

        def refuse(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(f"{NAMESPACE}::{self.name}: second derivatives are not supported")

        register_autograd(f"{NAMESPACE}::{self.name}_backward", refuse, lib=LIBRARY)
        register_autograd(
            f"{NAMESPACE}::{self.name}",
            derivative.gradients,
            setup_context=derivative.save,
            lib=LIBRARY,
        )

    def named_outputs(self, results: Any) -> dict[str, Any]:
        """The outputs by name; a single one is called out."""
        if self.outputs is Tensor:
            return {"out": results[0] if isinstance(results, tuple) else results}
        return dict(zip(self.outputs._fields, results, strict=True))


class _Derivative:
    """The derivative of one operator for autograd, and the layout of the backward's arguments; see `Operator.differentiate`."""

    def __init__(
        self,
        operator: Operator,
        grads: Mapping[str, str],
        saved: Sequence[str],
        frozen: Sequence[str],
    ) -> None:
        hints = get_type_hints(operator.inputs)
        self.operator, self.grads, self.saved, self.fields = operator, grads, saved, list(hints)
        self.tensors = [name for name, hint in hints.items() if hint in (Tensor, Tensor | None)]
        self.settings = [name for name in hints if name not in (*self.tensors, KEEP)]
        self.wanted = [name for name in self.tensors if name not in frozen]
        self.is_single = len(self.wanted) == 1
        self.backward: Callable[..., Any]
        self.parameters: dict[str, Any] = dict.fromkeys(grads, Tensor)
        self.parameters |= {name: hints[name] for name in self.tensors}
        self.parameters |= dict.fromkeys(saved, Tensor)
        self.parameters |= {name: hints[name] for name in self.settings}
        self.parameters |= {} if self.is_single else {"needs": list[bool]}

    def bundle(self, *values: Any) -> tuple[Any, Any, list[Tensor], list[bool]]:
        """The backward's arguments as a backend takes them: inputs, outputs, gradients, needs."""
        named = dict(zip(self.parameters, values, strict=True))
        outputs = self.operator.outputs
        saved = outputs(*map(named.get, outputs._fields)) if self.saved else None
        grads = [named[name] for name in self.grads]
        return self.inputs_of(named), saved, grads, named.get("needs", [True])

    def inputs_of(self, named: Mapping[str, Any]) -> Any:
        """The bundle of inputs from values by their names; a backward keeps nothing."""
        return self.operator.inputs(*(named.get(name, False) for name in self.fields))

    def fake(
        self, inputs: Any, outputs: Any, grads: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor]:
        """Uninitialised gradients."""
        return empty_gradients(self.tensors_of(inputs), needs)

    def tensors_of(self, inputs: Any) -> list[Tensor | None]:
        """The tensors that get gradients."""
        return [getattr(inputs, name) for name in self.wanted]

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Saves the backward's arguments, and the backend that was requested by name, which the backward uses too.

        It can run on another thread, or after a `use_backend` block.
        """
        *values, backend = inputs
        ctx.backend = requested_backend(self.operator.name, backend)
        ctx.set_materialize_grads(False)  # else autograd makes zeros for every saved output
        named = dict(zip(self.fields, values, strict=True))
        outputs = self.operator.named_outputs(output)
        ctx.settings = [named[name] for name in self.settings]
        saved = (outputs[name] for name in self.saved)
        ctx.save_for_backward(*(named[name] for name in self.tensors), *saved)
        constant = (t for name, t in outputs.items() if name not in self.grads.values())
        ctx.mark_non_differentiable(*constant)

    def gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """One gradient per argument of the forward; None for all if no output was used."""
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        by_output = self.operator.named_outputs(grads)
        found = [by_output[output] for output in self.grads.values()]
        kept = ctx.saved_tensors  # asked for once: activation checkpointing allows no second time
        if any(grad is None for grad in found):
            found = self._or_zeros(ctx, kept, found)
        needed = dict(zip(self.fields, ctx.needs_input_grad, strict=False))
        needs = [needed[name] for name in self.wanted]
        options = (*ctx.settings, *([] if self.is_single else [needs]), ctx.backend)
        results = self.backward(*found, *kept, *options)
        results = [results] if self.is_single else results
        by_name = {
            name: gradient if need else None
            for name, gradient, need in zip(self.wanted, results, needs, strict=True)
        }
        return *map(by_name.get, self.fields), None

    def _or_zeros(
        self, ctx: Any, kept: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The gradients, and zeros like the output where an output was not used."""
        named = dict(zip((*self.tensors, *self.saved), kept, strict=True))
        inputs = self.inputs_of(named | dict(zip(self.settings, ctx.settings, strict=True)))
        like = self.operator.named_outputs(self.operator.fake(inputs))
        return [
            torch.zeros_like(like[output]) if grad is None else grad
            for output, grad in zip(self.grads.values(), grads, strict=True)
        ]


def signed(parameters: Mapping[str, Any], returns: Any) -> Callable[..., Any]:
    """A function whose signature has these parameters, by their types."""

    def function(*values: Any) -> Any: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=hint) for name, hint in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returns)  # type: ignore[attr-defined]
    return function


def refusing_transforms(owner: Any, operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator; it raises `RuntimeError` for forward-mode derivatives, which torch would silently take to be zero.

    It raises likewise for gradients by `torch.func`: torch's own error does not say what to call.
    """

    def forward(*arguments: Any) -> Any:
        if not (owner.is_differentiable and is_transformed()):
            return operator(*arguments)
        name = f"{NAMESPACE}::{owner.name}"
        if has_tangent(arguments):
            message = "forward-mode derivatives (torch.func.jvp, jacfwd) are not supported"
            raise RuntimeError(f"{name}: {message}; call torch.autograd.grad or backward()")
        try:
            return operator(*arguments)
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
            message = "gradients by torch.func (grad, vjp, jacrev) are not supported"
            raise RuntimeError(
                f"{name}: {message}; call torch.autograd.grad or backward()"
            ) from None

    return forward


def has_tangent(arguments: Sequence[Any]) -> bool:
    """Whether forward-mode differentiation goes through any of the tensors."""
    return forward_ad._current_level >= 0 and any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in arguments
    )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient with respect to any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or in its place one without elements, since an operator cannot return None."""
    return like.new_empty(0) if tensor is None else tensor
