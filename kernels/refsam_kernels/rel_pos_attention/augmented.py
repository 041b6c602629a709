"""Attention with decomposed relative positions as plain attention on augmented queries and keys.

The bias is an exact product: `[q, rel_h, rel_w]` times `[k, one-hot row, one-hot column]` is the logit
(rel_h and rel_w over the scale). So a GPU without Triton can use torch's memory-efficient kernel, which
holds no scores. The products with the tables are rounded to the queries' dtype on the way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.rel_pos_attention.windows import Windows

# The kernel reads 16 bytes at a time: eight values of two bytes.
MULTIPLE = 8
# Windows and heads of a launch: they are blocks along the grid's second axis.
MOST_HEADS = 65_535


def is_supported(qkv: Tensor, num_heads: int) -> bool:
    """Whether torch has the kernel for such tensors."""
    head_dim = qkv.shape[-1] // (3 * num_heads)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return qkv.is_cuda and qkv.dtype in dtypes and head_dim % MULTIPLE == 0 and qkv.numel() > 0


def attend(windows: Windows) -> tuple[Tensor, Tensor]:
    """Output (G, queries, head_dim) and the logarithm of each softmax's sum (G, queries, 1)."""
    queries, keys = augmented(windows)
    attended, log_sum_exp = efficient_attention(queries, keys, windows.v, windows.scale)
    return attended, log_sum_exp[..., None].to(windows.dtype)


def augmented(windows: Windows) -> tuple[Tensor, Tensor]:
    """Augmented queries (G, queries, ·) and keys (G, keys, ·), their width a multiple of `MULTIPLE`."""
    height, width = windows.group.key_height, windows.group.key_width
    relative = [(rel / windows.scale).to(windows.q.dtype) for rel in (windows.rel_h, windows.rel_w)]
    rows, columns = (
        torch.eye(size, dtype=windows.k.dtype, device=windows.k.device) for size in (height, width)
    )
    one_hots = torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], -1)
    queries = torch.cat([windows.q, *relative], -1)
    keys = torch.cat([windows.k, one_hots.expand(len(windows.k), -1, -1)], -1)
    missing = -queries.shape[-1] % MULTIPLE
    return F.pad(queries, (0, missing)), F.pad(keys, (0, missing))


def efficient_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of (G, tokens, ·) and its log-sum-exp (G, queries) by torch's kernel for CUDA."""
    parts = []
    for q, k, v in zip(*(x.split(MOST_HEADS) for x in (queries, keys, values)), strict=True):
        attended, log_sum_exp, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q[None], k[None], v[None], None, compute_log_sumexp=True, scale=scale
        )
        # The kernel pads the statistics to whole tiles.
        parts.append((attended[0], log_sum_exp[0, :, : q.shape[1]]))
    if len(parts) == 1:
        return parts[0]
    attended, log_sum_exp = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return attended, log_sum_exp
