"""The arguments and results of `rel_pos_attention`."""

from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refsam_kernels.core.flops import Product


class Inputs(NamedTuple):
    """The public function's arguments; the tables are those of the windows, or of the grid if `window_size` is 0."""

    qkv: Tensor
    rel_pos_h: Tensor
    rel_pos_w: Tensor
    qkv_bias: Tensor | None
    num_heads: int
    window_size: int
    pad_mode: str

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.qkv.shape[-1] // (3 * self.num_heads)


class Outputs(NamedTuple):
    """Output (B, h, w, D), and for the backward the log-sum-exp of each softmax (B, heads, h, w), float32 at least."""

    out: Tensor
    log_sum_exp: Tensor


def empty_outputs(inputs: Inputs) -> Outputs:
    """Uninitialised, contiguous outputs."""
    qkv = inputs.qkv
    images, h, w, width = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    log_sum_exp = qkv.new_empty(images, inputs.num_heads, h, w, dtype=wide)
    return Outputs(qkv.new_empty(images, h, w, width // 3), log_sum_exp)


def count_products(inputs: Any) -> list[Product]:
    """Queries with keys, probabilities with values, queries with both position tables; padding's keys count."""
    images, h, w, width = inputs.qkv
    rows, columns = (inputs.window_size,) * 2 if inputs.window_size else (h, w)
    queries = images * (ceil(h / rows) * rows) * (ceil(w / columns) * columns)
    per_key = 2 * queries * (width // 3)
    products = [(2 * per_key * rows * columns, None), (per_key * rows, "rel_pos_h")]
    return [*products, (per_key * columns, "rel_pos_w")]
