"""The gradients of `rel_pos_attention`'s tables, one axis at a time: partial sums over tokens, in a fixed order."""

import triton
import triton.language as tl

from refsam_kernels.rel_pos_attention.triton.tiles import (
    _load,
    _skewed,
    _store,
)


@triton.jit
def _table_gradient_kernel(
    qkv,  # (B, h, w, 3*D), any strides
    d_rel,  # float32, as `_query_gradient_kernel` wrote it
    parts,  # written, float32: (splits, 2*SIZE-1, HEAD_DIM)
    stride_b, stride_y, stride_x, stride_c,  # of qkv
    key_stride, token_stride,  # of d_rel
    h, w, heads, tiles, tiles_each, tiles_in_all,
    SIZE: tl.constexpr,  # of a window along the table's axis
    OF_ROWS: tl.constexpr,  # which axis that is
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums d_rel * q over the tokens of some tiles, all images and heads counted through, for CHUNK rows of a table."""
    split = tl.program_id(0)
    first = tl.program_id(1) * CHUNK
    tokens = h * w
    acc0 = tl.zeros([CHUNK, D0], tl.float32)
    acc1 = tl.zeros([CHUNK, D1 if D1 > 0 else 1], tl.float32)
    last = tl.minimum((split + 1) * tiles_each, tiles_in_all)
    for tile in range(split * tiles_each, last):
        plane = (tile // tiles).to(tl.int64)
        token = tile % tiles * BLOCK + tl.arange(0, BLOCK)
        exists = token < tokens
        y = token // w
        x = token % w
        position = (y if OF_ROWS else x) % SIZE
        pointers, mask = _skewed(
            position, exists, first, d_rel + plane * tokens * SIZE, token, key_stride, token_stride,
            SIZE, CHUNK,
        )  # fmt: skip
        gradient = tl.load(pointers, mask=mask, other=0.0).to(qkv.dtype.element_ty)
        base = qkv + plane // heads * stride_b + plane % heads * HEAD_DIM * stride_c
        offsets = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        q = _load(base, offsets, exists, stride_c, HEAD_DIM, 0, D0)
        acc0 = tl.dot(tl.trans(gradient), q, acc0)
        if D1 > 0:
            q = _load(base, offsets, exists, stride_c, HEAD_DIM, D0, D1)
            acc1 = tl.dot(tl.trans(gradient), q, acc1)
    row = first + tl.arange(0, CHUNK)
    offsets = (split.to(tl.int64) * (2 * SIZE - 1) + row) * HEAD_DIM
    in_table = row < 2 * SIZE - 1
    _store(parts, offsets, in_table, acc0, HEAD_DIM, 0, D0)
    if D1 > 0:
        _store(parts, offsets, in_table, acc1, HEAD_DIM, D0, D1)
