"""The projections into the heads: channels first, positions folded, some expressions at a time, and their gradient."""

import torch
from torch import Tensor

from refsam_kernels.token_image_attention.positions import project_positions


class Projection:
    """weight (tokens + positions) + bias of some expressions: (P, T, C) -> (P, I, T), without what is None.

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
    """The gradient of `Projection`: to the tokens for each slice, to everything else when all are done."""

    def __init__(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        weight: Tensor,
        *,
        needs_positions: bool = False,
        needs_bias: bool = False,
    ) -> None:
        self.weight, self.needs_positions = weight, needs_positions
        tokens, self.shared = _add_own(tokens, positions)
        self.tokens = tokens.to(weight.dtype)
        self.on_tokens: list[Tensor] = []
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.on_weight = weight.new_zeros(weight.shape, dtype=wide)
        self.on_added = None  # what the forward calls `added`, if anything wants its gradient
        if needs_bias or self.shared is not None:
            self.on_added = weight.new_zeros(len(weight), tokens.shape[1], dtype=wide)

    def __call__(self, grad: Tensor, part: slice) -> Tensor:
        """The gradient to the slice's tokens, (P, T, C), for `grad` (P, I, T) to their projection."""
        tokens = self.tokens[part]
        self.on_weight += (grad @ tokens).sum(0, dtype=self.on_weight.dtype)
        if self.on_added is not None:
            self.on_added += grad.sum(0, dtype=self.on_added.dtype)
        on_tokens = grad.mT @ for_each(self.weight, grad)
        if self.needs_positions and self.shared is None:
            self.on_tokens.append(on_tokens)
        return on_tokens

    def totals(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Gradients to positions, weight and bias; None for what was not asked for."""
        on_positions = torch.cat(self.on_tokens) if self.on_tokens else None
        if self.on_added is None:
            return on_positions, self.on_weight, None
        if self.shared is not None:
            on_added = self.on_added.to(self.weight.dtype)
            self.on_weight += on_added @ self.shared[0].to(self.weight.dtype)
            on_positions = (on_added.T @ self.weight)[None] if self.needs_positions else None
        return on_positions, self.on_weight, self.on_added.sum(1)


def for_each(weight: Tensor, tokens: Tensor) -> Tensor:
    """The weight once for each expression, without a copy."""
    return weight.expand(len(tokens), -1, -1)


def _add_own(tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens with the positions that are each expression's own, and the positions that all share."""
    if positions is None or len(positions) == 1:
        return tokens, positions
    return tokens + positions, None
