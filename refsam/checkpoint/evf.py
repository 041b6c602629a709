"""EVF-SAM's published checkpoints: which tensors they hold, under which names, and the tokenizer beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from refsam.checkpoint.conversion import KeyReport, decoder_sizes, encoder_sizes
from refsam.checkpoint.files import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    Source,
    check_keys,
)
from refsam.checkpoint.foreign import read_folder
from refsam.checkpoint.sentencepiece import SPECIAL, read_sentencepiece
from refsam.config import EVFConfig, config_from_dict
from refsam.errors import CheckpointError

ExpectedTensors = Callable[[EVFConfig], Mapping[str, Tensor]]

PREFIXES = {"visual_model.": "", "mm_extractor.beit3.": "beit3.", "text_hidden_fcs.0.": "text_mlp."}
"""Prefixes of EVF-SAM's names, and their prefixes here."""

UNUSED = (
    "visual_model.prompt_encoder.point_embeddings.",
    "visual_model.prompt_encoder.not_a_point_embed.",
    "visual_model.prompt_encoder.mask_downscaling.",
    "mm_extractor.beit3.vision_embed.mask_token",
)
"""Prefixes of tensors that are not used: points, boxes and masks as prompts, BEiT-3's masked patch."""

HEAD_WIDTH = 64  # of BEiT-3, base and large


def is_unused(name: str) -> bool:
    """Whether EVF-SAM stores this tensor without computing with it."""
    return name.startswith(UNUSED)


def is_evf_folder(directory: Path) -> bool:
    """Whether a folder's `config.json` is EVF-SAM's own."""
    try:
        header = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(header, dict) and "mm_extractor_scale" in header


def read_evf(
    directory: str | Path, expected: ExpectedTensors | None = None, dtype: torch.dtype | None = None
) -> tuple[Checkpoint, KeyReport]:
    """EVF-SAM's published folder as a checkpoint of kind `evf`.

    It holds `config.json`, weights (`*.safetensors` or `pytorch_model*.bin`, in one file or several) and a tokenizer
    (`tokenizer.json` or a sentencepiece model). expected checks names and shapes. dtype is that of the result; None: float32.
    Nothing is unpickled but tensors. Raises CheckpointError for another model, or where something is missing or damaged.
    """
    directory = Path(directory)
    _check_scale(directory)
    stored = read_folder(directory)
    tensors = {ours(name): tensor for name, tensor in stored.items() if not is_unused(name)}
    ignored = tuple(sorted(name for name in stored if is_unused(name)))
    config = detect_evf_config(tensors)
    if expected is not None:
        check_keys(tensors, expected(config))
    tensors = {name: tensor.to(dtype or torch.float32) for name, tensor in tensors.items()}
    source = Source(directory.name)
    checkpoint = Checkpoint(config, tensors, "evf", read_tokenizer_text(directory), {"evf": source})
    return checkpoint, KeyReport(tuple(tensors), ignored)


def ours(name: str) -> str:
    """The name here of a tensor that EVF-SAM stores; a foreign name stays as it is."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name if prefix is None else PREFIXES[prefix] + name.removeprefix(prefix)


def _check_scale(directory: Path) -> None:
    header: dict[str, Any] = {}
    if is_evf_folder(directory):
        header = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    scale = header.get("sam_scale", "none")
    if scale != "huge":
        raise CheckpointError(
            f"{directory}: sam_scale in {CONFIG_FILE} is {scale!r}, wanted 'huge': EVF-SAM on SAM's ViT-H, "
            "not its variants on SAM 2 or EfficientSAM"
        )


def detect_evf_config(tensors: Mapping[str, Tensor]) -> EVFConfig:
    """The configuration whose sizes these tensors (under the names here) have.

    Heads of BEiT-3 are 64 wide, those of the mask decoder 8. Raises CheckpointError if these are not EVF-SAM's tensors.
    """
    try:
        values = {
            "image_encoder": encoder_sizes(tensors) | {"adapter_ratio": 0},
            "mask_decoder": decoder_sizes(tensors),
            "beit3": _beit3_sizes(tensors),
            "prompt_dim": tensors["image_encoder.neck.0.weight"].shape[0],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"not an EVF-SAM checkpoint: no usable {error}") from None
    return config_from_dict(EVFConfig, values)


def _beit3_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    prefix = "beit3.encoder.layers."
    vocabulary_size, width = tensors["beit3.text_embed.weight"].shape
    patch_size = tensors["beit3.vision_embed.proj.weight"].shape[-1]
    patches = len(tensors["beit3.encoder.embed_positions.A.weight"]) - 3
    return {
        "width": width,
        "depth": 1 + max(int(key.split(".")[3]) for key in tensors if key.startswith(prefix)),
        "num_heads": width // HEAD_WIDTH,
        "hidden": len(tensors[f"{prefix}0.ffn.A.fc1.weight"]),
        "image_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "vocabulary_size": vocabulary_size,
        "positions": len(tensors["beit3.encoder.embed_positions.B.weight"]),
    }


def read_tokenizer_text(directory: Path) -> str:
    """The JSON text of the tokenizer in a folder, made of a sentencepiece model where there is no `tokenizer.json`.

    Raises CheckpointError if there is none, or it is not BEiT-3's.
    """
    file = directory / TOKENIZER_FILE
    models = sorted([*directory.glob("*.spm"), *directory.glob("*.model")])
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        # tokenizers raises bare Exceptions.
        except Exception as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from None
    elif models:
        tokenizer = read_sentencepiece(models[0])
    else:
        raise CheckpointError(
            f"{directory}: no tokenizer, wanted {TOKENIZER_FILE}, sentencepiece.bpe.model or beit3.spm"
        )
    if [tokenizer.token_to_id(token) for token in SPECIAL] != [0, 1, 2, 3]:
        raise CheckpointError(
            f"{directory}: the tokenizer is not BEiT-3's: {', '.join(SPECIAL)} are not tokens 0 to 3"
        )
    return tokenizer.to_str()
