"""Two-way blocks of transformers' mask decoders, SAM's and SAM 2's: attentions between tokens and pixels by one operator."""

from typing import Any

from torch import Tensor

from refsam_kernels.integrations.encoders import are_weights_wanted
from refsam_kernels.integrations.replacement import Replacement, members_of
from refsam_kernels.integrations.two_way_transformer import is_faster, is_plain
from refsam_kernels.token_image_attention.inputs import AttentionWeights
from refsam_kernels.token_image_attention.op import token_image_attention

MEMBERS = {
    "self_attn", "layer_norm1", "cross_attn_token_to_image", "layer_norm2", "mlp", "layer_norm3", "layer_norm4",
    "cross_attn_image_to_token",
}  # fmt: skip
TAKES = (
    "queries", "keys", "query_point_embedding", "key_point_embedding", "attention_similarity", "kwargs"
)  # fmt: skip
# The last one is called otherwise in SAM 2's.
PROJECTIONS = (("q_proj", "k_proj", "v_proj", "out_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"))


def replacements(path: str, transformer: Any) -> list[Replacement]:
    """The replacements for a two-way transformer's blocks; none for one that is another inside, which goes on as it is."""
    layers = list(enumerate(transformer.layers))
    if any(members_of(layer) != MEMBERS for _, layer in layers):
        return []
    found = [
        Replacement(f"{path}.layers.{i}", each, _block, parameters=TAKES) for i, each in layers
    ]
    return [] if any(reason for item in found for reason in item.reasons()) else found


def _block(
    block: Any,
    queries: Tensor,
    keys: Tensor,
    query_point_embedding: Tensor,
    key_point_embedding: Tensor,
    attention_similarity: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Sam2TwoWayAttentionBlock.forward` on tokens (B, P, T, C) and pixels (B * P, 1, h * w, C).

    The block's own method computes where the operator would not be faster, or where the modules do more than compute.
    """
    positions = query_point_embedding, key_point_embedding
    if not _is_served(block, queries, keys, attention_similarity):
        return type(block).forward(block, queries, keys, *positions, attention_similarity, **kwargs)
    if block.skip_first_layer_pe:
        queries = block.self_attn(query=queries, key=queries, value=queries)[0]
    else:
        placed = queries + query_point_embedding
        queries = queries + block.self_attn(query=placed, key=placed, value=queries)[0]
    queries = block.layer_norm1(queries)
    to_image, to_token = block.cross_attn_token_to_image, block.cross_attn_image_to_token
    queries = _attend(to_image, block.layer_norm2, queries, keys, *positions)
    queries = block.layer_norm3(queries + block.mlp(queries))
    keys = _attend(to_token, block.layer_norm4, keys, queries, *reversed(positions))
    return queries, keys, None


def _is_served(block: Any, queries: Tensor, keys: Tensor, similarity: Tensor | None) -> bool:
    if similarity is not None or are_weights_wanted(None, "mask_decoder_attentions"):
        return False
    pairs = (
        (block.cross_attn_token_to_image, block.layer_norm2),
        (block.cross_attn_image_to_token, block.layer_norm4),
    )
    return is_faster(queries.flatten(0, 1), keys.flatten(0, 1)) and all(
        is_plain(attention, norm, _projections(attention)) for attention, norm in pairs
    )


def _projections(attention: Any) -> tuple[str, ...]:
    return PROJECTIONS[hasattr(attention, "o_proj")]


def _attend(
    attention: Any, norm: Any, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
) -> Tensor:
    """`norm(queries + attention)` like the queries."""
    layers = [getattr(attention, name) for name in _projections(attention)]
    weights = AttentionWeights(*(t for layer in layers for t in (layer.weight, layer.bias)))
    return token_image_attention(
        queries.flatten(0, 1),
        keys.flatten(0, 1),
        query_pe.flatten(0, 1),
        key_pe.flatten(0, 1),
        weights,
        norm.weight,
        norm.bias,
        num_heads=attention.num_attention_heads,
        eps=norm.eps,
    ).view(queries.shape)
