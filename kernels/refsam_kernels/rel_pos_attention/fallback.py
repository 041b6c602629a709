"""`rel_pos_attention` in plain PyTorch, arranged for speed and memory.

Scores exist for a few queries at a time only; the backward computes them again. Padding tokens are
never queries; as keys they are the bias. The softmax and sums over many parts are
float32 at least. On CUDA devices torch's own attention computes the forward (see `augmented`).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.rel_pos_attention import augmented
from refsam_kernels.rel_pos_attention.inputs import Inputs, Outputs, empty_outputs
from refsam_kernels.rel_pos_attention.reference import relative
from refsam_kernels.rel_pos_attention.window_groups import WindowGroup, window_groups
from refsam_kernels.rel_pos_attention.windows import (
    Windows,
    accumulation_dtype,
    split_qkv,
)

# Elements in the queries of the heads that are processed at a time; intermediate results are some eight times that.
QUERIES = {"cpu": 2**20}
QUERIES_ELSEWHERE = 2**26


def forward(inputs: Inputs) -> Outputs:
    """Output (B, h, w, D) and the logarithm of each softmax's sum (B, heads, h, w)."""
    qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pad_mode = inputs
    outputs = empty_outputs(inputs)
    out, log_sum_exp = heads_apart(outputs.out, num_heads), as_grid(outputs.log_sum_exp)
    attend = augmented.attend if augmented.is_supported(qkv, num_heads) else Windows.attend
    for group, heads in parts_of_grid(qkv, num_heads, window_size, pad_mode):
        windows = Windows(group, heads, qkv, qkv_bias, (rel_pos_h, rel_pos_w), num_heads)
        attended, statistic = attend(windows)
        group.write_queries(attended, out[..., heads, :])
        group.write_queries(statistic, log_sum_exp[..., heads, :])
    return outputs


def backward(
    inputs: Inputs, outputs: Outputs, grads: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients with respect to qkv, both tables and the bias of padding tokens."""
    qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pad_mode = inputs
    tables = (rel_pos_h, rel_pos_w)
    grad_out, out = (heads_apart(tensor, num_heads) for tensor in (*grads, outputs.out))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_q, grad_k, grad_v = split_qkv(grad_qkv, num_heads)
    dtype = accumulation_dtype(qkv)
    grad_padding = qkv.new_zeros(3, *grad_q.shape[-2:], dtype=dtype)
    grad_relative = [torch.zeros_like(relative(table), dtype=dtype) for table in tables]
    grids = (grad_out, out, as_grid(outputs.log_sum_exp))
    for group, heads in parts_of_grid(qkv, num_heads, window_size, pad_mode):
        windows = Windows(group, heads, qkv, qkv_bias, tables, num_heads)
        taken = (group.queries(grid[..., heads, :]) for grid in grids)
        gradients = windows.attend_backward(*taken)
        group.write_queries(gradients.q, grad_q[..., heads, :])
        grad_padding[1, heads] += group.write_keys(gradients.k, grad_k[..., heads, :])
        grad_padding[2, heads] += group.write_keys(gradients.v, grad_v[..., heads, :])
        if needs[1] or needs[2]:
            windows.add_to_relative(gradients, *grad_relative)
    return [grad_qkv, *map(sum_of_relative, grad_relative), grad_padding]


def parts_of_grid(
    qkv: Tensor, num_heads: int, window_size: int, pad_mode: str
) -> Iterator[tuple[WindowGroup, slice]]:
    """Cuts the work into groups of windows and, of each, as many heads as `QUERIES` allows; at least one."""
    B, h, w, width = qkv.shape
    budget = QUERIES.get(qkv.device.type, QUERIES_ELSEWHERE)
    for group in window_groups(h, w, window_size, pad_mode):
        elements = B * group.tokens * width // (3 * num_heads)
        heads = max(1, budget // max(1, elements))
        for first in range(0, num_heads, heads):
            yield group, slice(first, first + heads)


def heads_apart(tensor: Tensor, num_heads: int) -> Tensor:
    """(..., D) as a view (..., heads, head_dim)."""
    return tensor.unflatten(-1, (num_heads, -1))


def as_grid(log_sum_exp: Tensor) -> Tensor:
    """(B, heads, h, w) as a view (B, h, w, heads, 1)."""
    return log_sum_exp.permute(0, 2, 3, 1)[..., None]


def sum_of_relative(products: Tensor) -> Tensor:
    """The transpose of `relative`: sums (size, size, d) over equal distances, to (2*size-1, d).

    These are sums along diagonals, in a fixed order: with reversed keys they are antidiagonals, and
    rows that are read one element shorter than they were written shift by one each.
    """
    size = products.shape[0]
    written = F.pad(products.flip(1), (0, 0, 0, size)).flatten(0, 1)
    return written[:-size].unflatten(0, (size, 2 * size - 1)).sum(0)
