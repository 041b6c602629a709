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
    queries, keys, q_weight, num_heads = (
        inputs.queries,
        inputs.keys,
        inputs.q_weight,
        inputs.num_heads,
    )
    (_, query_count, channels), head_width = queries.shape, len(q_weight) // num_heads
    # Float32 products have no tensor cores: their operands are held in registers, so tiles are smaller.
    tile = 16 if q_weight.element_size() == 4 or channels > 256 else 32
    few_queries, few_keys = (_block(count) for count in (query_count, keys.shape[1]))
    return {
        "queries": query_count,
        "keys": keys.shape[1],
        "channels": channels,
        "heads": num_heads,
        "head_width": head_width,
        "scale": head_width**-0.5,
        "eps": inputs.eps,
        "QUERIES": tile if keys.shape[1] <= FEW else few_queries,
        "KEYS": few_keys if keys.shape[1] <= FEW else tile,
        "CHANNELS": _block(channels),
        "HEAD": _block(head_width),
    }


def _block(count: int) -> int:
    """The smallest power of two that holds `count`, at least 16 as products need."""
    return max(16, triton.next_power_of_2(count))


def _added(projection: Projection, count: int, name: str) -> dict[str, Any]:
    """The constant part of a projection, expanded over the expressions without a copy, and its strides."""
    tokens = projection.tokens
    added, strides = projection.added, (0, 0, 0)
    if added is not None:
        added = added.expand(len(tokens), len(projection.weight), count)
        strides = (added.stride(0), added.stride(1), added.stride(2))
    names = ("added_expression_stride", "added_row_stride", "added_token_stride")
    return {f"{name}_ptr": added, **dict(zip(names, strides, strict=True))}


def few_keys_launch(to_q: Projection, tensors: dict[str, Any], sizes: dict[str, Any]) -> Launch:
    """The launch from pixels to tokens; `tensors` by the kernel's names, `sizes` those of `sizes_of`."""
    tensors = tensors | {"tokens": to_q.tokens.contiguous(), "q_weight": to_q.weight.contiguous()}
    sizes = sizes | _added(to_q, sizes["queries"], "q_added")
    tiles = triton.cdiv(sizes["queries"], sizes["QUERIES"])
    return Launch.choosing(_few_keys_kernel, (tiles, len(to_q.tokens)), tensors, sizes)


def many_keys_launches(
    to_k: Projection, to_v: Projection, tensors: dict[str, Any], sizes: dict[str, Any]
) -> list[Launch]:
    """The launches from tokens to pixels: the tiles of keys, then their join."""
    expressions, tiles = len(to_k.tokens), triton.cdiv(sizes["keys"], sizes["KEYS"])
    new = partial(to_k.tokens.new_empty, dtype=torch.float32)
    sums = (expressions, sizes["heads"], tiles, sizes["queries"])
    tensors = tensors | {
        "tokens": to_k.tokens.contiguous(),
        "content": to_v.tokens.contiguous(),
        "k_weight": to_k.weight.contiguous(),
        "v_weight": to_v.weight.contiguous(),
        "parts": new(expressions, tiles, len(to_k.weight), sizes["queries"]),
        "highest": new(sums),
        "totals": new(sums),
    }
    sizes = sizes | {"tiles": tiles} | _added(to_k, sizes["keys"], "k_added")
    attend = Launch.choosing(_many_keys_kernel, (tiles, expressions), tensors, sizes)
    # A program of the second kernel adds up several parts at a time, as many as registers hold.
    at_a_time = min(triton.next_power_of_2(tiles), max(1, 512 // sizes["HEAD"]))
    sizes = sizes | {"QUERIES": ROWS, "TILES": at_a_time}
    programs = (triton.cdiv(sizes["queries"], ROWS), expressions)
    return [attend, Launch.choosing(_join_kernel, programs, tensors, sizes)]


def backward_launch(
    tensors: dict[str, Tensor], key_lengths: Tensor | None, num_heads: int
) -> tuple[Launch, list[Tensor]]:
    """The launch, and the gradients to q, k and v that it writes, in parts (parts, P, I, T)."""
    q, k, v = (tensors[name] for name in "qkv")
    (expressions, width, queries), keys = q.shape, k.shape[2]
    tile = 32 if q.element_size() == 4 else 64
    few_keys = keys <= FEW
    blocks = {"QUERIES": tile if few_keys else _block(queries)}
    blocks |= {"KEYS": _block(keys) if few_keys else tile, "HEAD": _block(width // num_heads)}
    tiles = (triton.cdiv(queries, blocks["QUERIES"]), triton.cdiv(keys, blocks["KEYS"]))
    parts = [
        x.new_empty(count, *x.shape, dtype=x.dtype if count == 1 else torch.float32)
        for x, count in ((q, tiles[1]), (k, tiles[0]), (v, tiles[0]))
    ]
    written = dict(zip(("grad_q", "grad_k", "grad_v"), parts, strict=True))
    sizes = {"expressions": expressions, "queries": queries, "keys": keys, "heads": num_heads}
    head_width = width // num_heads
    sizes |= {"head_width": head_width, "scale": head_width**-0.5} | blocks
    sizes["HAS_ALL_KEYS"] = tiles[1] == 1
    programs = (*tiles, expressions * num_heads)
    arguments = tensors | written | {"lengths": key_lengths}
    return Launch.choosing(_backward_kernel, programs, arguments, sizes), parts
