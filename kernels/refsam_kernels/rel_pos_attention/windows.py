"""Attention of equal windows in plain PyTorch, forward and backward, on a few queries at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from refsam_kernels.rel_pos_attention.reference import relative
from refsam_kernels.rel_pos_attention.window_groups import WindowGroup

LOG2_E = math.log2(math.e)

# Scores at a time. On a CPU they stay in the cores' second-level caches: 2 MB in float32.
SCORES = {"cpu": 2**19}
SCORES_ELSEWHERE = 2**26


@dataclass(frozen=True)
class WindowGradients:
    """Gradients with respect to the tensors of `Windows`, at least float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    rel_h: Tensor
    rel_w: Tensor


class Windows:
    """The attention of some heads of a group of windows: q, k, v are (G, tokens, head_dim), G counting windows' heads.

    `relative_h` (height, key_height, head_dim) and `relative_w` are the tables' rows for every
    query and key position of an axis; `rel_h` (G, queries, key_height) and `rel_w` are their
    products with the queries.
    """

    def __init__(
        self,
        group: WindowGroup,
        heads: slice,
        qkv: Tensor,
        qkv_bias: Tensor | None,
        tables: tuple[Tensor, Tensor],
        num_heads: int,
    ) -> None:
        self.group = group
        self.dtype = accumulation_dtype(qkv)
        q, k, v = split_qkv(qkv, num_heads)[..., heads, :]
        k_padding = v_padding = None
        if qkv_bias is not None:
            _, k_padding, v_padding = split_qkv(qkv_bias, num_heads)[:, heads]
        self.q = group.queries(q)
        self.k = group.keys(k, k_padding)
        self.v = group.keys(v, v_padding)
        self.scale = self.q.shape[-1] ** -0.5
        relative_h, relative_w = (relative(table.to(self.dtype)) for table in tables)
        self.relative_h = relative_h[: group.height, : group.key_height]
        self.relative_w = relative_w[: group.width, : group.key_width]
        queries = self.on_grid(self.q)
        self.rel_h = torch.einsum("gyxd,ykd->gyxk", queries, self.relative_h).flatten(1, 2)
        self.rel_w = torch.einsum("gyxd,xkd->gyxk", queries, self.relative_w).flatten(1, 2)

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Tokens (G, queries, ·) as (G, height, width, ·), at least float32."""
        return tokens.to(self.dtype).unflatten(1, (self.group.height, self.group.width))

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Cuts (G, queries) into parts of few enough scores."""
        G, queries, _ = self.q.shape
        keys = self.k.shape[1]
        budget = SCORES.get(self.q.device.type, SCORES_ELSEWHERE)
        heads = max(1, budget // (queries * keys))
        rows = max(1, min(queries, budget // keys))
        for first_head in range(0, G, heads):
            for first_row in range(0, queries, rows):
                yield slice(first_head, first_head + heads), slice(first_row, first_row + rows)

    def scores(self, part: tuple[slice, slice]) -> Tensor:
        """Logits (heads, rows, keys) of a part, at least float32."""
        scores = (self.rel_h[part][..., :, None] + self.rel_w[part][..., None, :]).flatten(2)
        return add_product(scores, self.q[part], self.k[part[0]].mT, self.scale)

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output (G, queries, head_dim) and the logarithm of each softmax's sum (G, queries, 1)."""
        attended = torch.empty_like(self.q)
        log_sum_exp = self.rel_h.new_empty(*self.q.shape[:2], 1)
        for part in self.parts():
            scores = self.scores(part)
            largest_score = scores.amax(-1, keepdim=True)
            probabilities = torch.softmax(scores, -1, out=scores)
            torch.bmm(probabilities.to(self.v.dtype), self.v[part[0]], out=attended[part])
            # The largest probability is exp(largest score - log_sum_exp).
            largest = probabilities.amax(-1, keepdim=True)
            log_sum_exp[part] = largest_score - largest.log_()
        return attended, log_sum_exp

    def attend_backward(
        self, grad: Tensor, attended: Tensor, log_sum_exp: Tensor
    ) -> WindowGradients:
        """Gradients for the gradient (G, queries, head_dim) of the output."""
        tensors = (self.q, self.k, self.v, self.rel_h, self.rel_w)
        total = WindowGradients(*(torch.zeros_like(t, dtype=self.dtype) for t in tensors))
        delta = (attended.to(self.dtype) * grad).sum(-1, keepdim=True)
        self.rel_h -= log_sum_exp  # so that the scores are the probabilities' logarithms
        for part in self.parts():
            heads = part[0]
            probabilities = self.scores(part).mul_(LOG2_E).exp2_()  # cheaper than exp
            add_product(total.v[heads], probabilities.to(grad.dtype).mT, grad[part])
            grad_scores = torch.bmm(grad[part], self.v[heads].mT).to(self.dtype)
            grad_scores.sub_(delta[part]).mul_(probabilities)
            grad_keys = grad_scores.unflatten(-1, (self.group.key_height, self.group.key_width))
            torch.sum(grad_keys, -1, out=total.rel_h[part])
            torch.sum(grad_keys, -2, out=total.rel_w[part])
            grad_scores = grad_scores.to(grad.dtype)
            add_product(total.q[part], grad_scores, self.k[heads], self.scale)
            add_product(total.k[heads], grad_scores.mT, self.q[part], self.scale)
        grad_queries = self.on_grid(total.q)  # a view: what follows adds to total.q
        rel_h, rel_w = self.on_grid(total.rel_h), self.on_grid(total.rel_w)
        grad_queries += torch.einsum("gyxk,ykd->gyxd", rel_h, self.relative_h)
        grad_queries += torch.einsum("gyxk,xkd->gyxd", rel_w, self.relative_w)
        return total

    def add_to_relative(self, gradients: WindowGradients, grad_h: Tensor, grad_w: Tensor) -> None:
        """Adds the gradients of `relative_h` and `relative_w` to those of all of `relative`."""
        queries = self.on_grid(self.q)
        rel_h, rel_w = self.on_grid(gradients.rel_h), self.on_grid(gradients.rel_w)
        heights, key_heights, _ = self.relative_h.shape
        widths, key_widths, _ = self.relative_w.shape
        grad_h[:heights, :key_heights] += torch.einsum("gyxk,gyxd->ykd", rel_h, queries)
        grad_w[:widths, :key_widths] += torch.einsum("gyxk,gyxd->xkd", rel_w, queries)


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Adds a batched matrix product, times `scale`, to `total` in place, in `total`'s dtype."""
    if left.dtype == total.dtype:
        return total.baddbmm_(left, right, alpha=scale)
    return total.add_(torch.bmm(left, right).to(total.dtype), alpha=scale)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def split_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """(..., 3*D) as a view (3, ..., heads, head_dim)."""
    return tensor.unflatten(-1, (3, num_heads, -1)).movedim(-3, 0)
