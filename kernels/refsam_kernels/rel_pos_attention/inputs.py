"""The arguments and results of `rel_pos_attention`."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The public function's arguments; the tables are those of the windows, or of the grid if `window_size` is 0."""

    qkv: Tensor
    rel_pos_h: Tensor
    rel_pos_w: Tensor
    qkv_bias: Tensor | None
    num_heads: int
    window_size: int
    pad_mode: str


class Outputs(NamedTuple):
    """Output (B, h, w, D), and for the backward the log-sum-exp of each softmax (B, heads, h, w), float32 at least."""

    out: Tensor
    log_sum_exp: Tensor
