"""The projections into the heads: channels first, positions absorbed, some expressions at a time, and their gradient."""

import torch
from torch import Tensor

from refsam_kernels.token_image_attention.positions import project_positions


class Projection:
    """weight (tokens + positions) + bias of some expressions: (P, T, C) -> (P, I, T); None terms are left out.

    Positions that all expressions share are projected once and added to each expression's own product.
    """

    def __init__(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        remember: bool = False,
    ) -> None:
        self.weight = weight
        tokens, shared = _add_own(tokens, positions)
        self.tokens = tokens.to(weight.dtype)
        self.added = None if bias is None else bias.view(1, -1, 1)
        if shared is not None:
            self.added = project_positions(shared, weight, bias, remember)

    def __call__(self, part: slice) -> Tensor:
        """The projection of the expressions in the slice."""
        tokens = self.tokens[part]
        weight = for_each(self.weight, tokens)
        return (
            weight @ tokens.mT
            if self.added is None
            else torch.baddbmm(self.added, weight, tokens.mT)
        )


class ProjectionGradient:
    """The gradient of weight tokens: to the tokens for each slice, to the weight when all are done, in `grad_weight`."""

    def __init__(self, tokens: Tensor, weight: Tensor) -> None:
        self.tokens, self.weight = tokens.to(weight.dtype), weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.grad_weight = weight.new_zeros(weight.shape, dtype=wide)

    def __call__(self, grad: Tensor, part: slice) -> Tensor:
        """The gradient to the slice's tokens, (P, T, C), for `grad` (P, I, T) to their projection."""
        self.grad_weight += (grad @ self.tokens[part]).sum(0, dtype=self.grad_weight.dtype)
        return grad.mT @ for_each(self.weight, grad)


class PositionGradient:
    """The gradient of weight positions + bias, which `Projection` adds; all of it when all slices are done."""

    def __init__(
        self, positions: Tensor, weight: Tensor, count: int, needs_positions: bool
    ) -> None:
        self.positions, self.weight = positions.to(weight.dtype), weight
        self.is_shared, self.needs_positions = len(positions) == 1, needs_positions
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.grad_weight = weight.new_zeros(weight.shape, dtype=wide)
        self.grad_added = weight.new_zeros(len(weight), count, dtype=wide)
        self.grad_own: list[Tensor] = []

    def add(self, grad: Tensor, part: slice) -> None:
        """Takes the gradient to the slice's projections, (P, I, T)."""
        self.grad_added += grad.sum(0, dtype=self.grad_added.dtype)
        if self.is_shared:
            return
        self.grad_weight += (grad @ self.positions[part]).sum(0, dtype=self.grad_weight.dtype)
        if self.needs_positions:
            self.grad_own.append(grad.mT @ for_each(self.weight, grad))

    def totals(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients to positions (None if they are not wanted), weight and bias."""
        grad_bias = self.grad_added.sum(1)
        if not self.is_shared:
            return torch.cat(self.grad_own) if self.grad_own else None, self.grad_weight, grad_bias
        grad_added = self.grad_added.to(self.weight.dtype)
        grad_positions = (grad_added.T @ self.weight)[None] if self.needs_positions else None
        return grad_positions, grad_added @ self.positions[0], grad_bias


def for_each(weight: Tensor, tokens: Tensor) -> Tensor:
    """The weight once for each expression, without a copy."""
    return weight.expand(len(tokens), -1, -1)


def _add_own(tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens with the positions that are each expression's own, and the positions that all share."""
    if positions is None or len(positions) == 1:
        return tokens, positions
    return tokens + positions, None
