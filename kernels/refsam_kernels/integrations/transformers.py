"""transformers' `SamModel`, `SamVisionModel` and `SamVisionEncoder`: which methods are replaced, and by what."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from refsam_kernels.integrations.replacement import (
    Attend,
    Replacement,
    attention_reasons,
    encoder_of,
    perceptron_replacement,
    refuse,
    structure_reasons,
)

LAYER_MEMBERS = {"layer_norm1", "attn", "layer_norm2", "mlp"}
# By the attention that the model was made with: eager, SDPA.
ATTENTION_CLASSES = {"SamVisionAttention", "SamVisionSdpaAttention"}


def replacements(model: nn.Module) -> list[Replacement]:
    """The replacements for these models. Raises `ValueError` if the model is modified inside."""
    path, encoder = encoder_of(model, "vision_encoder", "SamVisionEncoder")
    layers = [(f"{path}.layers.{i}", layer) for i, layer in enumerate(encoder.layers)]
    refuse([reason for where, layer in layers for reason in _layer_reasons(where, layer)])
    return [item for where, layer in layers for item in _layer_replacements(where, layer)]


def _layer_reasons(path: str, layer: Any) -> Iterator[str]:
    reasons = list(structure_reasons(path, layer, {"SamVisionLayer"}, LAYER_MEMBERS))
    if reasons:
        yield from reasons
        return
    yield from attention_reasons(f"{path}.attn", layer.attn, ATTENTION_CLASSES)
    dropout = getattr(layer.attn, "dropout", 0.0)
    if dropout:
        yield f"{path}.attn.dropout: got {dropout}, wanted 0: attention's weights are never made"


def _layer_replacements(path: str, layer: Any) -> Iterator[Replacement]:
    yield Replacement(path, layer, _layer, parameters=("hidden_states",))
    attend = Attend(num_heads=layer.attn.num_attention_heads, window_size=layer.window_size)
    wanted = ("hidden_states", "output_attentions")
    yield Replacement(f"{path}.attn", layer.attn, partial(_attention, attend), parameters=wanted)
    yield from perceptron_replacement(f"{path}.mlp", layer.mlp)


def _layer(layer: Any, hidden_states: Tensor) -> Tensor:
    """`SamVisionLayer.forward` on (B, h, w, D), its attention being handed the grid, not windows."""
    attended, _ = layer.attn(hidden_states=layer.layer_norm1(hidden_states))
    hidden_states = hidden_states + attended
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


def _attention(
    attend: Attend,
    attention: Any,
    hidden_states: Tensor,
    output_attentions: bool | None = None,
) -> tuple[Tensor, None]:
    """`SamVisionAttention.forward`; like SDPA's it returns no weights, asked for or not."""
    return attend(attention, hidden_states), None
