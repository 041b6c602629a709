"""The two-way transformer of segment-anything's mask decoder: attentions between tokens and pixels by `token_image_attention`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refsam_kernels.integrations.replacement import Replacement, structure_reasons
from refsam_kernels.packed_linear import is_plain_linear, is_unhooked
from refsam_kernels.token_image_attention.inputs import AttentionWeights
from refsam_kernels.token_image_attention.op import token_image_attention

MEMBERS = {"layers", "final_attn_token_to_image", "norm_final_attn"}
BLOCK_MEMBERS = {
    "self_attn", "norm1", "cross_attn_token_to_image", "norm2", "mlp", "norm3", "norm4", "cross_attn_image_to_token"
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
EMBEDDINGS = ("image_embedding", "image_pe", "point_embedding")
TOKENS = ("queries", "keys", "query_pe", "key_pe")


class Sizes(NamedTuple):
    """Calls for which the operator was measured faster: at least so many prompts, at most so many tokens each."""

    dtype: torch.dtype
    prompts: int
    tokens: int


# On a CPU, from benchmarks/results/decoder_cpu.jsonl. In bfloat16, and on a GPU where nothing was measured, nowhere.
FASTER = (
    Sizes(torch.float32, prompts=1, tokens=16),
    Sizes(torch.float32, prompts=4, tokens=32),
)


def replacements(path: str, transformer: Any) -> list[Replacement]:
    """The replacements for a `TwoWayTransformer`; none for one that is another inside, which goes on as it is."""
    if any(_reasons(path, transformer)):
        return []
    layers = enumerate(transformer.layers)
    found = [Replacement(path, transformer, _transformer, parameters=EMBEDDINGS)]
    found += [
        Replacement(f"{path}.layers.{i}", layer, _block, parameters=TOKENS) for i, layer in layers
    ]
    return [] if any(reason for item in found for reason in item.reasons()) else found


def _reasons(path: str, transformer: Any) -> Iterator[str]:
    reasons = list(structure_reasons(path, transformer, {"TwoWayTransformer"}, MEMBERS))
    yield from reasons
    if not reasons:
        for layer in transformer.layers:
            yield from structure_reasons(path, layer, {"TwoWayAttentionBlock"}, BLOCK_MEMBERS)
        if any(getattr(module, "dropout_p", 0.0) for module in transformer.modules()):
            yield f"{path}: got dropout in attention, wanted none"


def _transformer(
    transformer: Any, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """`TwoWayTransformer.forward` on an image (P, C, h, w), its positions and tokens (P, T, C)."""
    image, positions = (each.flatten(2).mT for each in (image_embedding, image_pe))
    tokens = point_embedding
    for layer in transformer.layers:
        tokens, image = layer(
            queries=tokens, keys=image, query_pe=point_embedding, key_pe=positions
        )
    last, norm = transformer.final_attn_token_to_image, transformer.norm_final_attn
    return attend(last, norm, tokens, image, point_embedding, positions), image


def _block(
    block: Any, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
) -> tuple[Tensor, Tensor]:
    """`TwoWayAttentionBlock.forward`: tokens to themselves and to the image, and back."""
    if block.skip_first_layer_pe:
        queries = block.self_attn(q=queries, k=queries, v=queries)
    else:
        placed = queries + query_pe
        queries = queries + block.self_attn(q=placed, k=placed, v=queries)
    queries = block.norm1(queries)
    to_image, to_token = block.cross_attn_token_to_image, block.cross_attn_image_to_token
    queries = attend(to_image, block.norm2, queries, keys, query_pe, key_pe)
    queries = block.norm3(queries + block.mlp(queries))
    return queries, attend(to_token, block.norm4, keys, queries, key_pe, query_pe)


def attend(
    attention: Any, norm: Any, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
) -> Tensor:
    """`norm(queries + attention)` like the queries (P, T, C): one operator where that is faster and nobody would notice."""
    is_known = type(attention).__name__ == "Attention"
    if not (is_known and is_faster(queries, keys) and is_plain(attention, norm, PROJECTIONS)):
        return norm(queries + attention(q=queries + query_pe, k=keys + key_pe, v=keys))
    layers = [getattr(attention, name) for name in PROJECTIONS]
    weights = AttentionWeights(*(t for layer in layers for t in (layer.weight, layer.bias)))
    query_pe, key_pe = (pe[:1] if pe.stride(0) == 0 else pe for pe in (query_pe, key_pe))
    return token_image_attention(
        queries,
        keys,
        query_pe,
        key_pe,
        weights,
        norm.weight,
        norm.bias,
        num_heads=attention.num_heads,
        eps=norm.eps,
    )


def is_faster(queries: Tensor, keys: Tensor) -> bool:
    """Whether `token_image_attention` was measured faster on such tokens and pixels, (P, T, C) each."""
    if queries.device.type != "cpu" or type(queries) is not Tensor or queries.dtype != keys.dtype:
        return False
    return was_faster(queries.dtype, len(queries), min(queries.shape[1], keys.shape[1]))


def was_faster(dtype: torch.dtype, prompts: int, tokens: int) -> bool:
    """Whether it was measured faster on so many prompts and tokens of each."""
    return any(
        dtype == sizes.dtype and prompts >= sizes.prompts and tokens <= sizes.tokens
        for sizes in FASTER
    )


def is_plain(attention: Any, norm: Any, projections: tuple[str, ...]) -> bool:
    """Whether calling these modules does nothing but compute with their weights, without gradient, autocast or tracing."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    layers: list[Any] = [getattr(attention, name, None) for name in projections]
    return (
        is_unhooked(attention)
        and all(is_plain_linear(layer) and layer.bias is not None for layer in layers)
        and type(norm) is nn.LayerNorm
        and is_unhooked(norm)
        and {type(norm.weight), type(norm.bias)} <= {nn.Parameter, Tensor}
    )
