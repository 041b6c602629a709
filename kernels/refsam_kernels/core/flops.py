"""Matrix products of the operators, for torch's FLOP counter, to which each operator is one node."""

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any

import torch

from refsam_kernels.core.registration import NAMESPACE, Operator

# The operations of a product, two for each multiplication with addition, and its second factor if that is a weight.
Product = tuple[int, str | None]
Products = Callable[[Any], Iterable[Product]]

_PRODUCTS: dict[Operator, Products] = {}


def counts(operator: Operator) -> Callable[[Products], Products]:
    """Registers the products of an operator's forward: a function of its inputs, with shapes in place of tensors."""

    def register(products: Products) -> Products:
        _PRODUCTS[operator] = products
        return products

    return register


def linear(rows: int, inputs: Any, *weights: str) -> list[Product]:
    """Rows through the linear layers whose weights have these names, where they are there."""
    shapes = {name: getattr(inputs, name) for name in weights}
    return [(2 * rows * prod(shape), name) for name, shape in shapes.items() if shape is not None]


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for `torch.utils.flop_counter.FlopCounterMode(custom_mapping=flop_formulas())`, of forwards and backwards.

    Matrix products count, two operations for each multiplication with addition; what a backward computes again does not. Packed
    linear layers, which are oneDNN's, count too.
    """
    packets = getattr(torch.ops, NAMESPACE)
    formulas: dict[Any, Callable[..., int]] = {}
    for operator, products in _PRODUCTS.items():
        formulas[getattr(packets, operator.name)] = partial(_forward, operator, products)
        if operator.is_differentiable:
            backward = getattr(packets, f"{operator.name}_backward")
            formulas[backward] = partial(_backward, operator, products)
    packed = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return formulas if packed is None else formulas | {packed: _packed}


def _packed(x: Any, *_: Any, out_shape: Any) -> int:
    return 2 * prod(out_shape) * x[-1]


def _forward(operator: Operator, products: Products, *values: Any, out_shape: Any = None) -> int:
    return sum(count for count, _ in products(operator.inputs(*values[:-1])))


def _backward(operator: Operator, products: Products, *values: Any, out_shape: Any = None) -> int:
    """As many again for the first factor's gradient, and for the second's where it is wanted."""
    inputs, _, _, needs = operator.derivative.bundle(*values[:-1])
    needed = dict(zip(operator.derivative.wanted, needs, strict=True))
    return sum(count * (1 + (name is None or needed[name])) for count, name in products(inputs))
