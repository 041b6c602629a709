"""Load a checkpoint by name, RefSAM's or EVF-SAM's, ready to build a model from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refsam.checkpoint.evf import is_evf_folder, read_evf
from refsam.checkpoint.files import (
    Checkpoint,
    find_sam,
    is_base,
    read_checkpoint,
    read_sam,
    resize_positions,
    resolve_directory,
)
from refsam.config import EVFConfig
from refsam.errors import CheckpointError


def load(
    name: str | Path,
    *,
    sam: str | Path | None = None,
    text_encoder: str | None = None,
    image_size: int | None = None,
    **hub_options: Any,
) -> Checkpoint:
    """Read a checkpoint, put a delta onto its SAM file, fit position tables to image_size.

    name: a bundled name, a folder or a Hub id, of this project's checkpoints or EVF-SAM's. sam: where SAM's file or its
    converted folder is, for a delta. text_encoder: replaces the name of the pretrained text encoder. Raises
    CheckpointError or ConfigError.
    """
    directory = resolve_directory(name, **hub_options)
    stored = read_evf(directory)[0] if is_evf_folder(directory) else read_checkpoint(directory)
    if isinstance(stored.config, EVFConfig):
        _refuse_for_evf(sam=sam, text_encoder=text_encoder, image_size=image_size)
        return stored
    tensors = stored.tensors
    if stored.kind == "delta":
        base = read_sam(find_sam(stored.sources.get("sam"), sam), stored.sources.get("sam"))
        tensors = {key: value for key, value in base.items() if is_base(key)} | tensors
    overrides = [] if image_size is None else [f"image_encoder.image_size={image_size}"]
    if text_encoder is not None:
        overrides.append(f"text_encoder.name={json.dumps(text_encoder)}")
    config = stored.config.override(*overrides)
    if image_size is not None:
        tensors = resize_positions(tensors, config)
    return Checkpoint(config, tensors, stored.kind, stored.tokenizer, stored.sources)


def _refuse_for_evf(**options: object) -> None:
    for option, value in options.items():
        if value is not None:
            raise CheckpointError(f"{option}: got {value}, but EVF-SAM is whole and has one size")
