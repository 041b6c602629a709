"""The launches of the Triton kernels of `token_image_attention`; tensors may be on the meta device."""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from refsam_kernels.core.triton_aot import Launch
from refsam_kernels.token_image_attention.inputs import Inputs
from refsam_kernels.token_image_attention.projection import Projection
from refsam_kernels.token_image_attention.triton.backward import _backward_kernel
from refsam_kernels.token_image_attention.triton.few_keys import _few_keys_kernel
from refsam_kernels.token_image_attention.triton.many_keys import _join_kernel, _many_keys_kernel

FEW = 64  # tokens that are one tile: keys in one direction, queries in the other
ROWS = 16  # of the result that a program of `_join_kernel` makes


def sizes_of(inputs: Inputs) -> dict[str, Any]:
    """Sizes and blocks that the kernels of one call share; blocks are powers of two."""
    (_, queries, channels), keys = inputs.queries.shape, inputs.keys.shape[1]
    head_width = len(inputs.q_weight) // inputs.num_heads
    # Float32 products have no tensor cores: their operands are held in registers, so tiles are smaller.
    tile = 16 if inputs.q_weight.element_size() == 4 or channels > 256 else 32
    return {
        "queries": queries,
        "keys": keys,
        "channels": channels,
        "heads": inputs.num_heads,
        "head_width": head_width,
        "scale": head_width**-0.5,
        "eps": inputs.eps,
        "QUERIES": tile if keys <= FEW else _block(queries),
        "KEYS": _block(keys) if keys <= FEW else tile,
        "CHANNELS": _block(channels),
        "HEAD": _block(head_width),
    }


def _block(count: int) -> int:
    """The smallest power of two that holds `count`, at least 16 as products need."""
    return max(16, triton.next_power_of_2(count))


def _added(projection: Projection, count: int, name: str) -> dict[str, Any]:
    """The constant part of a projection, expanded over the expressions without a copy, and its strides."""
    added, strides = projection.added, [0, 0, 0]
    if added is not None:
        added = added.expand(len(projection.tokens), len(projection.weight), count)
        strides = list(added.stride())
    names = ("added_expression_stride", "added_row_stride", "added_token_stride")
    return {name: added, **dict(zip(names, strides, strict=True))}


def few_keys_launch(to_q: Projection, values: dict[str, Any]) -> Launch:
    """The launch from pixels to tokens; `values` by the kernel's names, among them those of `sizes_of`."""
    own = {"tokens": to_q.tokens.contiguous(), "q_weight": to_q.weight.contiguous()}
    own |= _added(to_q, values["queries"], "q_added")
    tiles = triton.cdiv(values["queries"], values["QUERIES"])
    return Launch.choosing(_few_keys_kernel, (tiles, len(to_q.tokens)), values | own)


def many_keys_launches(to_k: Projection, to_v: Projection, values: dict[str, Any]) -> list[Launch]:
    """The launches from tokens to pixels: the tiles of keys, then their join; `values` as in `few_keys_launch`."""
    expressions, tiles = len(to_k.tokens), triton.cdiv(values["keys"], values["KEYS"])
    new = partial(to_k.tokens.new_empty, dtype=torch.float32)
    sums = (expressions, values["heads"], tiles, values["queries"])
    values = values | {
        "tokens": to_k.tokens.contiguous(),
        "content": to_v.tokens.contiguous(),
        "k_weight": to_k.weight.contiguous(),
        "v_weight": to_v.weight.contiguous(),
        "parts": new(expressions, tiles, len(to_k.weight), values["queries"]),
        "highest": new(sums),
        "totals": new(sums),
        "tiles": tiles,
        **_added(to_k, values["keys"], "k_added"),
    }
    attend = Launch.choosing(_many_keys_kernel, (tiles, expressions), values)
    # A program of the second kernel adds up several parts at a time, as many as registers hold.
    at_a_time = min(triton.next_power_of_2(tiles), max(1, 512 // values["HEAD"]))
    programs = (triton.cdiv(values["queries"], ROWS), expressions)
    of_join = values | {"QUERIES": ROWS, "TILES": at_a_time}
    return [attend, Launch.choosing(_join_kernel, programs, of_join)]


def backward_launch(
    tensors: dict[str, Tensor], key_lengths: Tensor | None, num_heads: int
) -> tuple[Launch, list[Tensor]]:
    """The launch, and the gradients to q, k and v that it writes, in parts (parts, P, I, T)."""
    q, k, v = (tensors[name] for name in "qkv")
    (expressions, width, queries), keys = q.shape, k.shape[2]
    tile = 32 if q.element_size() == 4 else 64
    block_q, block_k = (tile, _block(keys)) if keys <= FEW else (_block(queries), tile)
    tiles = (triton.cdiv(queries, block_q), triton.cdiv(keys, block_k))
    parts = [
        x.new_empty(count, *x.shape, dtype=x.dtype if count == 1 else torch.float32)
        for x, count in ((q, tiles[1]), (k, tiles[0]), (v, tiles[0]))
    ]
    head_width = width // num_heads
    values = {
        **tensors,
        **dict(zip(("grad_q", "grad_k", "grad_v"), parts, strict=True)),
        "lengths": key_lengths,
        "expressions": expressions,
        "queries": queries,
        "keys": keys,
        "heads": num_heads,
        "head_width": head_width,
        "scale": head_width**-0.5,
        "QUERIES": block_q,
        "KEYS": block_k,
        "HEAD": _block(head_width),
        "HAS_ALL_KEYS": tiles[1] == 1,
    }
    programs = (*tiles, expressions * num_heads)
    return Launch.choosing(_backward_kernel, programs, values), parts
