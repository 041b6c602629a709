"""EVF-SAM's published checkpoints: which tensors they hold, under which names, and the tokenizer beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from refsam.config import EVFConfig

ExpectedTensors = Callable[[EVFConfig], Mapping[str, Tensor]]

PREFIXES = {"visual_model.": "", "mm_extractor.beit3.": "beit3.", "text_hidden_fcs.0.": "text_mlp."}
"""Beginnings of EVF-SAM's names, and what stands for them here."""

UNUSED = (
    "visual_model.prompt_encoder.point_embeddings.",
    "visual_model.prompt_encoder.not_a_point_embed.",
    "visual_model.prompt_encoder.mask_downscaling.",
    "mm_extractor.beit3.vision_embed.mask_token",
)
"""Beginnings of names that play no part: points, boxes and masks as prompts, BEiT-3's masked patch."""

HEAD_WIDTH = 64  # of BEiT-3, base and large


def is_unused(name: str) -> bool:
    """Whether EVF-SAM stores this tensor without computing with it."""
    return name.startswith(UNUSED)
