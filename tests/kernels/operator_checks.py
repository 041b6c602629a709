"""Checks that hold for every operator; a test file gives the operator and inputs, tensors by name in float64.

An operator here is a function of its tensors by name and `backend`, which returns one tensor or a tuple of them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

Inputs = Mapping[str, Tensor]
Operator = Callable[..., Any]


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """The outputs as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def cast(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating point inputs in another dtype, the others as they are; none shares memory with the original."""
    return {
        name: tensor.detach().clone().to(dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def permuted(inputs: Inputs) -> dict[str, Tensor]:
    """The same values in dense memory whose strides are in another order: the last two dimensions are swapped."""
    return {
        name: tensor.mT.contiguous().mT if tensor.dim() >= 2 else tensor
        for name, tensor in inputs.items()
    }


def between(x: Tensor) -> Tensor:
    """Values that a kernel reads if it ignores strides: NaN, or for other dtypes a value that shows."""
    if x.is_floating_point():
        return torch.full_like(x, float("nan"))
    return ~x if x.dtype == torch.bool else torch.zeros_like(x)


def reversed_order(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def every_second(x: Tensor) -> Tensor:
    return torch.stack([x, between(x)], -1)[..., 0]


def within_wider_rows(x: Tensor) -> Tensor:
    return torch.cat([x, between(x[..., :1])], -1)[..., :-1]


def from_the_second_on(x: Tensor) -> Tensor:
    return torch.cat([between(x.flatten()[:1]), x.flatten()])[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    """The first value of each row in the row's place, without memory of its own for the others."""
    return x[..., :1].expand(x.shape)


def every_image_the_first(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


# A tensor of one dimension or more as a view, of the same values but for the last two; none is what `contiguous()` gives.
LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout
    for layout in (
        reversed_order,
        every_second,
        within_wider_rows,
        from_the_second_on,
        expanded,
        every_image_the_first,
    )
}


def check_layout(
    operator: Operator,
    inputs: Inputs,
    backend: str,
    layout: Callable[[Tensor], Tensor],
    frozen: tuple[str, ...] = (),
) -> None:
    """All inputs as such views give what their values give in compact memory: outputs and gradients."""
    if backend in ("reference", "fallback"):  # in float64, where rounding hides no stride
        inputs = cast(inputs, torch.float64)
    inputs = {name: x.detach().clone().contiguous() for name, x in inputs.items()}
    compact = {name: layout(x).contiguous() if x.dim() else x for name, x in inputs.items()}
    views = {name: layout(x) if x.dim() else x for name, x in inputs.items()}
    outputs, gradients = run(operator, compact, backend, frozen)
    found, found_gradients = run(operator, views, backend, frozen, clone=False)
    for index, pair in enumerate(zip(found, outputs, strict=True)):
        assert_close(f"output {index}", pair[0], pair[1].double(), 1e-5)
    # Repeated values make some gradients zero but for the rounding of what cancels: the largest gradient is the measure.
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    bound = 1e-5 * largest
    for name, wanted in gradients.items():
        assert found_gradients[name].shape == wanted.shape
        error = (found_gradients[name].double() - wanted).abs().max().item()
        assert error <= bound, f"gradient of {name}: error {error:.2e}, wanted at most {bound:.2e}"


def run(
    operator: Operator,
    inputs: Inputs,
    backend: str,
    frozen: tuple[str, ...] = (),
    *,
    clone: bool = True,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and gradients of a fixed random projection of them to the floating point inputs that are not frozen.

    A clone is dense; without, a view's strides reach the operator.
    """
    inputs = {name: x.detach().clone() if clone else x.detach() for name, x in inputs.items()}
    wanted = [name for name, x in inputs.items() if x.is_floating_point() and name not in frozen]
    for name in wanted:
        inputs[name].requires_grad_()
    outputs = outputs_of(operator(**inputs, backend=backend))
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = loss + (weight * output).sum()
    gradients = torch.autograd.grad(loss, [inputs[name] for name in wanted])
    return tuple(x.detach() for x in outputs), dict(zip(wanted, gradients, strict=True))


def assert_close(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal within the tolerance relative to the largest value; NaN is never close."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, wanted at most {tolerance}"


def assert_same_gradients(found: Inputs, wanted: Inputs, tolerance: float) -> None:
    """The same names, and gradients within the tolerance of their own largest value.

    Some are zero but for rounding: those may differ by a thousandth of that beside the largest of all.
    """
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        atol = tolerance * max(float(gradient.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol)


# A few roundings of the dtype, relative to the largest value.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check_matches_reference(
    operator: Operator,
    inputs: Inputs,
    backend: str,
    dtype: torch.dtype,
    frozen: tuple[str, ...] = (),
    zero: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Outputs and every gradient in `dtype` against the reference in float64, on the same rounded inputs.

    The error may be twice (of a gradient three times) that of the plain formula computed wholly in `dtype`, plus TOLERANCES.
    `zero` names gradients that are mathematically zero, and the gradient whose size says how large their error may be.
    """
    rounded = cast(inputs, dtype)
    found = run(operator, rounded, backend, frozen)
    exact = run(operator, cast(rounded, torch.float64), "reference", frozen)
    with mock.patch.object(torch, "promote_types", lambda first, second: first):
        eager = run(operator, rounded, "reference", frozen)
    for index, wanted in enumerate(exact[0]):
        outputs = (found[0][index], wanted, eager[0][index])
        assert_as_good_as_eager(f"output {index}", *outputs, wanted, dtype, 2)
    assert found[1].keys() == exact[1].keys()
    for name, gradient in found[1].items():
        assert gradient.dtype == rounded[name].dtype
        gradients = (gradient, exact[1][name], eager[1][name])
        size = exact[1][zero.get(name, name)]
        assert_as_good_as_eager(f"gradient of {name}", *gradients, size, dtype, 3)


def assert_as_good_as_eager(
    name: str,
    found: Tensor,
    wanted: Tensor,
    eager: Tensor,
    size: Tensor,
    dtype: torch.dtype,
    factor: float,
) -> None:
    """The error is at most `factor` times that of `eager` plus the dtype's tolerance relative to the largest of `size`."""
    assert found.shape == wanted.shape
    error, eager_error = ((x.double() - wanted).abs().max().item() for x in (found, eager))
    bound = factor * eager_error + TOLERANCES[dtype] * size.abs().max().item()
    assert error <= bound, f"{name}: error {error:.2e}, wanted at most {bound:.2e}"


def check_single_gradients(operator: Operator, inputs: Inputs, backend: str) -> None:
    """Each gradient asked for alone is that of all together."""
    _, together = run(operator, inputs, backend)
    for name in together:
        frozen = tuple(other for other in inputs if other != name)
        _, alone = run(operator, inputs, backend, frozen)
        assert alone.keys() == {name}
        torch.testing.assert_close(alone[name], together[name])


def check_repeats(operator: Operator, inputs: Inputs, backend: str) -> None:
    """Two runs give the same bits, forward and backward."""
    first, second = (run(operator, inputs, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first[0], second[0], strict=True))
    assert all(torch.equal(x, second[1][name]) for name, x in first[1].items())


def check_compiles(operator: Operator, inputs: Inputs, backend: str) -> None:
    """torch.compile keeps it in one graph and changes nothing, on compact and on permuted inputs."""
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    for values in (inputs, permuted(inputs)):
        outputs, gradients = run(operator, values, backend)
        found, found_gradients = run(compiled, values, backend)
        for got, wanted in zip(found, outputs, strict=True):
            torch.testing.assert_close(got, wanted)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient)


def check_checkpoint(operator: Operator, inputs: Inputs, backend: str) -> None:
    """Activation checkpointing gives the same gradients."""

    def checkpointed(backend: str, **tensors: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(
            operator, use_reentrant=False, backend=backend, **tensors
        )

    _, gradients = run(operator, inputs, backend)
    _, found = run(checkpointed, inputs, backend)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def check_forward_mode_raises(operator: Operator, inputs: Inputs, backend: str) -> None:
    """Forward-mode derivatives to any tensor are refused, not silently zero; so are torch.func's gradients, in words."""
    for name in (name for name, x in inputs.items() if x.is_floating_point()):

        def function(x: Tensor, name: str = name) -> Any:
            return operator(**{**inputs, name: x}, backend=backend)

        x = inputs[name]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="forward-mode derivatives"):
                function(dual)
        for derivative in (
            lambda: torch.func.jvp(function, (x,), (torch.ones_like(x),)),  # noqa: B023
            # By a factor of x: by x itself it would first make a square matrix of all of its elements.
            lambda: torch.func.jacfwd(lambda factor: function(factor * x))(x.new_ones(())),  # noqa: B023
        ):
            with pytest.raises(RuntimeError, match="forward-mode derivatives"):
                derivative()
        with pytest.raises(RuntimeError, match=r"by torch.func .* call torch.autograd.grad"):
            torch.func.grad(lambda x: outputs_of(function(x))[0].sum())(x)


def check_second_derivative_raises(operator: Operator, inputs: Inputs, name: str) -> None:
    """The gradient of a gradient is refused, not silently zero."""
    inputs = {**inputs, name: inputs[name].detach().clone().requires_grad_()}
    output = outputs_of(operator(**inputs, backend=None))[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs[name], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        gradient.sum().backward()


def check_schema_and_fakes(operator: Any, arguments: tuple[Any, ...]) -> None:
    """torch.library.opcheck on compact inputs, without and with gradients, and on permuted ones."""
    tensors = {str(i): x for i, x in enumerate(arguments) if isinstance(x, Tensor)}
    for layout, differentiable in (
        (tensors, False),
        (tensors, True),
        (permuted(tensors), True),
    ):
        values = list(arguments)
        for index, tensor in layout.items():
            grad = differentiable and tensor.is_floating_point()
            values[int(index)] = tensor.detach().requires_grad_(grad)
        torch.library.opcheck(operator, tuple(values))
