"""Registration and public function of `rel_pos_attention`."""

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core.checks import autocast, check_same_device, check_same_dtype, require
from refsam_kernels.core.flops import counts
from refsam_kernels.core.registration import Operator
from refsam_kernels.rel_pos_attention.inputs import Inputs, Outputs, count_products, empty_outputs
from refsam_kernels.rel_pos_attention.int8 import op as int8

PAD_MODES = ("bias", "mask", "none")

operator = Operator("rel_pos_attention", Inputs, Outputs)


_forward = operator.forward(empty_outputs)
operator.differentiate({"grad_out": "out"}, saved=["out", "log_sum_exp"])
counts(operator)(count_products)


def rel_pos_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    num_heads: int,
    window_size: int = 0,
    qkv_bias: Tensor | None = None,
    pad_mode: str = "bias",
    int8_scores: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Multi-head self-attention on a grid of tokens with SAM's decomposed relative positions.

    The logit of a query at (y, x) and a key at (v, u) is
    `q k / sqrt(head_dim) + q rel_pos_h[y - v + size - 1] + q rel_pos_w[x - u + size - 1]`.

    Args:
        qkv: (B, h, w, 3*D) floating point, the qkv product with its bias, laid out
            [3, heads, head_dim].
        rel_pos_h, rel_pos_w: (2*size-1, head_dim), qkv's dtype; `size` is the window's, or the
            grid's height and width. Another odd length is interpolated as SAM does.
        num_heads: heads; D is a multiple of it.
        window_size: side of the windows that attend within themselves; 0 for the whole grid.
        qkv_bias: (3*D,), the q, k and v of padding tokens; None for zeros.
        pad_mode: what fills the windows that stick out of the grid. "bias": padding tokens, which
            are keys and values, as in SAM; "mask": nothing; "none": there must be none.
        int8_scores: compute `q k` in 8-bit integers: a token's values are rounded to 127ths of its largest (63rds on a
            processor with AVX2 and without instructions for 8-bit products). For inference, in float32 or bfloat16. A
            token with a value that is not finite counts as NaN.
        backend: name of the backend; None lets the library choose.

    Returns:
        (B, h, w, D) in qkv's dtype, the heads side by side. Under autocast the operands are cast
        to its dtype. The gradient with respect to `qkv_bias` is that of the padding tokens only.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendError: the requested backend cannot run.
        RuntimeError: with int8_scores, if autograd would record the call.

    Follows segment-anything `modeling/image_encoder.py`, `Attention` and `window_partition`.
    """
    _check(Inputs(qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pad_mode))
    _, h, w, _ = qkv.shape
    rel_pos_h = resize_table(rel_pos_h, window_size or h)
    rel_pos_w = resize_table(rel_pos_w, window_size or w)
    tensors = autocast(qkv, rel_pos_h, rel_pos_w, qkv_bias)
    check_same_dtype(
        **dict(zip(("qkv", "rel_pos_h", "rel_pos_w", "qkv_bias"), tensors, strict=True))
    )
    inputs = Inputs(*tensors, num_heads, window_size, pad_mode)  # type: ignore[call-arg]
    if int8_scores:
        return int8.attend(inputs, backend or "")
    return _forward(*inputs, backend or "")[0]


def resize_table(table: Tensor, size: int) -> Tensor:
    """The table (length, head_dim) interpolated linearly to (2*size-1, head_dim), as segment-anything's `get_rel_pos` does."""
    if table.shape[0] == 2 * size - 1:
        return table
    resized = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")
    return resized[0].T


def _check(inputs: Inputs) -> None:
    """Raises `ValueError` for arguments that `rel_pos_attention` cannot take."""
    qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pad_mode = inputs
    require(qkv.dim() == 4, "qkv", f"shape {tuple(qkv.shape)}", "(B, h, w, 3*D)")
    _, h, w, width = qkv.shape
    require(h > 0 and w > 0, "qkv", f"shape {tuple(qkv.shape)}", "a grid with tokens")
    require(num_heads > 0, "num_heads", num_heads, "a positive number")
    multiple = f"(B, h, w, 3*D) with D a multiple of num_heads={num_heads}"
    require(
        width > 0 and width % (3 * num_heads) == 0, "qkv", f"shape {tuple(qkv.shape)}", multiple
    )
    head_dim = width // (3 * num_heads)
    for name, table in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)):
        fits = table.dim() == 2 and table.shape[1] == head_dim and table.shape[0] % 2 == 1
        wanted = f"(odd length, {head_dim}), {head_dim} being qkv's width / 3 / num_heads"
        require(fits, name, f"shape {tuple(table.shape)}", wanted)
    if qkv_bias is not None:
        fits = tuple(qkv_bias.shape) == (width,)
        require(fits, "qkv_bias", f"shape {tuple(qkv_bias.shape)}", f"({width},)")
    require(window_size >= 0, "window_size", window_size, "0 for global attention, or the side")
    require(pad_mode in PAD_MODES, "pad_mode", repr(pad_mode), f"one of {', '.join(PAD_MODES)}")
    fits = pad_mode != "none" or window_size == 0 or (h % window_size, w % window_size) == (0, 0)
    wanted = f"a divisor of the grid {h} x {w} with pad_mode 'none'"
    require(fits, "window_size", window_size, wanted)
    check_same_device(qkv=qkv, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w, qkv_bias=qkv_bias)
