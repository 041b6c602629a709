"""`rel_pos_attention` in plain PyTorch, arranged for speed and memory.

Scores exist for a few queries at a time only; the backward computes them again. Padding tokens are
never queries; as keys they are the bias. The softmax, and whatever is summed over many parts, is at
least float32. On CUDA devices torch's own attention computes the forward (see `one_hot`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.rel_pos_attention import one_hot
from refsam_kernels.rel_pos_attention.regions import Region, regions

LOG2_E = math.log2(math.e)

# Scores at a time. On a CPU they stay in the cores' second-level caches: 2 MB in float32.
SCORES = {"cpu": 2**19}
SCORES_ELSEWHERE = 2**26
# Numbers in the queries of the heads that are worked on at a time; what is copied and made for them is some eight times that.
QUERIES = {"cpu": 2**20}
QUERIES_ELSEWHERE = 2**26


def forward(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    window_size: int,
    pad_mode: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, h, w, D) and the logarithm of each softmax's sum (B, heads, h, w)."""
    B, h, w, width = qkv.shape
    out = qkv.new_empty(B, h, w, num_heads, width // (3 * num_heads))
    log_sum_exp = qkv.new_empty(B, num_heads, h, w, dtype=accumulation_dtype(qkv))
    attend = one_hot.attend if one_hot.serves(qkv, num_heads) else Windows.attend
    for region, heads in parts_of_grid(qkv, num_heads, window_size, pad_mode):
        windows = Windows(region, heads, qkv, qkv_bias, (rel_pos_h, rel_pos_w), num_heads)
        attended, statistic = attend(windows)
        region.write_queries(attended, out[..., heads, :])
        region.write_queries(statistic, on_places(log_sum_exp)[..., heads, :])
    return out.flatten(3), log_sum_exp


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    qkv_bias: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    window_size: int,
    pad_mode: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients with respect to qkv, both tables and the bias of padding tokens."""
    tables = (rel_pos_h, rel_pos_w)
    grad_out, out = (heads_apart(tensor, num_heads) for tensor in (grad_out, out))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_q, grad_k, grad_v = split_qkv(grad_qkv, num_heads)
    dtype = accumulation_dtype(qkv)
    grad_padding = qkv.new_zeros(3, *grad_q.shape[-2:], dtype=dtype)
    grad_relative = [torch.zeros_like(relative(table), dtype=dtype) for table in tables]
    grids = (grad_out, out, on_places(log_sum_exp))
    for region, heads in parts_of_grid(qkv, num_heads, window_size, pad_mode):
        windows = Windows(region, heads, qkv, qkv_bias, tables, num_heads)
        taken = (region.queries(grid[..., heads, :]) for grid in grids)
        gradients = windows.attend_backward(*taken)
        region.write_queries(gradients.q, grad_q[..., heads, :])
        grad_padding[1, heads] += region.write_keys(gradients.k, grad_k[..., heads, :])
        grad_padding[2, heads] += region.write_keys(gradients.v, grad_v[..., heads, :])
        if needs[1] or needs[2]:
            windows.add_to_relative(gradients, *grad_relative)
    grad_h, grad_w = (sum_of_relative(total).to(qkv.dtype) for total in grad_relative)
    results = (grad_qkv, grad_h, grad_w, grad_padding.flatten().to(qkv.dtype))
    pairs = zip(results, needs, strict=True)
    return [result if need else qkv.new_empty(0) for result, need in pairs]


def parts_of_grid(
    qkv: Tensor, num_heads: int, window_size: int, pad_mode: str
) -> Iterator[tuple[Region, slice]]:
    """Cuts the work into regions and, of each, as many heads as `QUERIES` allows; at least one."""
    B, h, w, width = qkv.shape
    budget = QUERIES.get(qkv.device.type, QUERIES_ELSEWHERE)
    for region in regions(h, w, window_size, pad_mode):
        elements = B * region.tokens * width // (3 * num_heads)
        heads = max(1, budget // max(1, elements))
        for first in range(0, num_heads, heads):
            yield region, slice(first, first + heads)


@dataclass(frozen=True)
class WindowGradients:
    """Gradients with respect to the tensors of `Windows`, at least float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    rel_h: Tensor
    rel_w: Tensor


class Windows:
    """The attention of some heads of a region: q, k, v are (G, tokens, head_dim), G counting windows' heads.

    `relative_h` (height, key_height, head_dim) and `relative_w` are the tables' rows for every
    query and key position of an axis; `rel_h` (G, queries, key_height) and `rel_w` are their
    products with the queries.
    """

    def __init__(
        self,
        region: Region,
        heads: slice,
        qkv: Tensor,
        qkv_bias: Tensor | None,
        tables: tuple[Tensor, Tensor],
        num_heads: int,
    ) -> None:
        self.region = region
        self.dtype = accumulation_dtype(qkv)
        q, k, v = split_qkv(qkv, num_heads)[..., heads, :]
        k_padding = v_padding = None
        if qkv_bias is not None:
            _, k_padding, v_padding = split_qkv(qkv_bias, num_heads)[:, heads]
        self.q = region.queries(q)
        self.k = region.keys(k, k_padding)
        self.v = region.keys(v, v_padding)
        self.scale = self.q.shape[-1] ** -0.5
        relative_h, relative_w = (relative(table.to(self.dtype)) for table in tables)
        self.relative_h = relative_h[: region.height, : region.key_height]
        self.relative_w = relative_w[: region.width, : region.key_width]
        queries = self.on_grid(self.q)
        self.rel_h = torch.einsum("gyxd,ykd->gyxk", queries, self.relative_h).flatten(1, 2)
        self.rel_w = torch.einsum("gyxd,xkd->gyxk", queries, self.relative_w).flatten(1, 2)

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Tokens (G, queries, ·) as (G, height, width, ·), at least float32."""
        return tokens.to(self.dtype).unflatten(1, (self.region.height, self.region.width))

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
            on_scores = torch.bmm(grad[part], self.v[heads].mT).to(self.dtype)
            on_scores.sub_(delta[part]).mul_(probabilities)
            on_keys = on_scores.unflatten(-1, (self.region.key_height, self.region.key_width))
            torch.sum(on_keys, -1, out=total.rel_h[part])
            torch.sum(on_keys, -2, out=total.rel_w[part])
            on_scores = on_scores.to(grad.dtype)
            add_product(total.q[part], on_scores, self.k[heads], self.scale)
            add_product(total.k[heads], on_scores.mT, self.q[part], self.scale)
        on_queries = self.on_grid(total.q)  # a view: what follows adds to total.q
        rel_h, rel_w = self.on_grid(total.rel_h), self.on_grid(total.rel_w)
        on_queries += torch.einsum("gyxk,ykd->gyxd", rel_h, self.relative_h)
        on_queries += torch.einsum("gyxk,xkd->gyxd", rel_w, self.relative_w)
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


def heads_apart(tensor: Tensor, num_heads: int) -> Tensor:
    """(..., D) as a view (..., heads, head_dim)."""
    return tensor.unflatten(-1, (num_heads, -1))


def on_places(log_sum_exp: Tensor) -> Tensor:
    """(B, heads, h, w) as a view (B, h, w, heads, 1)."""
    return log_sum_exp.permute(0, 2, 3, 1)[..., None]


def relative(table: Tensor) -> Tensor:
    """The table's row for every query and key position of an axis: (size, size, head_dim)."""
    size = (table.shape[0] + 1) // 2
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions[None, :] + size - 1]


def sum_of_relative(products: Tensor) -> Tensor:
    """The transpose of `relative`: sums (size, size, d) over equal distances, to (2*size-1, d).

    These are sums along diagonals, in a fixed order: with reversed keys they are antidiagonals, and
    rows that are read one element shorter than they were written shift by one each.
    """
    size = products.shape[0]
    written = F.pad(products.flip(1), (0, 0, 0, size)).flatten(0, 1)
    return written[:-size].unflatten(0, (size, 2 * size - 1)).sum(0)
