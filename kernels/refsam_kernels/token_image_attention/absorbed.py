"""Attention between few tokens and many pixels that projects the tokens alone; nothing is kept for a gradient.

A head's logits are `(Wq x)^T (Wk t) = x^T (Wq^T Wk t)`, and its share of a row is `Wo Wv` of a weighted sum of values. With the
pixels' weights absorbed into the tokens, an attention is two products with the unprojected pixels, with one row per head and
token. That is about the cost of one projection of the pixels, in place of two projections, the logits and the weighted sum.
The biases of k and v are left out as in `fallback`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.index_checks import valid_positions
from refsam_kernels.token_image_attention.inputs import Inputs


class Absorbed:
    """The sum of queries and update, (P, Tq, C), for some expressions at a time."""

    def __init__(self, inputs: Inputs) -> None:
        self.queries, self.keys, self.query_pe, self.key_pe = inputs[:4]
        self.key_lengths, self.num_heads = inputs.key_lengths, inputs.num_heads
        self.q_weight, self.q_bias, self.k_weight = inputs.weights[:3]
        self.v_weight, self.out_weight = inputs.v_weight, inputs.out_weight
        self.added = torch.addmv(inputs.out_bias, self.out_weight, inputs.v_bias)
        self.scale = (len(self.q_weight) // self.num_heads) ** -0.5

    def __call__(self, part: slice) -> Tensor:
        """The sum for the expressions in the slice."""
        placed = _placed(self.queries, self.query_pe, part)
        keys = _placed(self.keys, self.key_pe, part)
        if placed.shape[1] <= keys.shape[1]:
            return self._tokens_to_pixels(placed, keys, self.keys[part]).add_(self.queries[part])
        lengths = None if self.key_lengths is None else self.key_lengths[part]
        weights, values = self._pixels_to_tokens(placed, keys, self.keys[part], lengths)
        return torch.baddbmm(self.queries[part], weights.mT, values)

    def _tokens_to_pixels(self, tokens: Tensor, placed: Tensor, pixels: Tensor) -> Tensor:
        """The update of tokens (P, T, C) with their positions, from pixels (P, N, C) with and without theirs."""
        query = self._heads(F.linear(tokens, self.q_weight, self.q_bias)) * self.scale
        logits = _rows(query @ self._by_heads(self.k_weight)) @ placed.mT
        mixed = (logits.softmax(dim=-1) @ pixels).unflatten(1, query.shape[1:3])
        attended = mixed @ self._by_heads(self.v_weight).mT
        return F.linear(attended.transpose(1, 2).flatten(2), self.out_weight, self.added)

    def _pixels_to_tokens(
        self, placed: Tensor, placed_tokens: Tensor, tokens: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weights (P, rows, N) and values (P, rows, C) whose product is the update of the pixels.

        From pixels (P, N, C) with their positions and tokens (P, T, C) with and without theirs.
        """
        key = self._heads(F.linear(placed_tokens, self.k_weight)) * self.scale
        offset = key @ self.q_bias.view(self.num_heads, -1, 1)
        if lengths is not None:
            padding = ~valid_positions(lengths, tokens.shape[1])
            offset = offset.masked_fill(padding[:, None, :, None], float("-inf"))
        logits = torch.baddbmm(_rows(offset), _rows(key @ self._by_heads(self.q_weight)), placed.mT)
        weights = logits.unflatten(1, key.shape[1:3]).softmax(dim=2)
        # Each head's weights sum to one, so each can carry its share of the constant update of every pixel.
        value = self._heads(F.linear(tokens, self.v_weight))
        values = value @ self._by_heads(self.out_weight.T) + self.added / self.num_heads
        return _rows(weights), _rows(values)

    def _heads(self, tokens: Tensor) -> Tensor:
        """(P, T, I) -> (P, heads, T, d)."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _by_heads(self, weight: Tensor) -> Tensor:
        """(I, C) -> (heads, d, C)."""
        return weight.unflatten(0, (self.num_heads, -1))


def is_cheaper_absorbed(inputs: Inputs) -> bool:
    """Whether absorbed weights cost less: the rows, heads times tokens, exceed the internal width by a quarter at most.

    So many rows cost less than the products of each head that they save (docs/performance.md). False in half precision, where
    the absorbed weights would be rounded, and where pixels may be padding.
    """
    queries, keys, weights = inputs.queries, inputs.keys, inputs.weights
    dtypes = {queries.dtype, keys.dtype, *(weight.dtype for weight in weights)}
    tokens = min(queries.shape[1], keys.shape[1])
    from_tokens = inputs.key_lengths is not None and queries.shape[1] <= keys.shape[1]
    is_wide = dtypes <= {torch.float32, torch.float64} and len(dtypes) == 1
    return is_wide and not from_tokens and 4 * inputs.num_heads * tokens <= 5 * len(weights[0])


def _placed(tokens: Tensor, positions: Tensor, part: slice) -> Tensor:
    return tokens[part] + (positions if len(positions) == 1 else positions[part])


def _rows(of_heads: Tensor) -> Tensor:
    """(P, heads, T, C) -> (P, heads * T, C)."""
    return of_heads.flatten(1, 2)
