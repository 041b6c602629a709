"""Loads a RefSAM or an EVF-SAM, by its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refsam import checkpoint
from refsam.config import EVFConfig
from refsam.model.evf_sam import EVFSAM
from refsam.model.prompted_sam import PromptedSAM
from refsam.model.refsam import RefSAM


def load_model(name: str | Path, **options: Any) -> PromptedSAM:
    """The model, in eval mode, of a bundled name (`nano`), a folder or a Hub id: a `RefSAM` or an `EVFSAM`.

    EVF-SAM's published checkpoints are read as they are (`YxZhang/evf-sam-multitask`). options: as for
    `RefSAM.from_pretrained`; EVF-SAM takes only those of huggingface_hub. Raises CheckpointError or ConfigError.
    """
    stored = checkpoint.load(name, **options)
    is_evf = isinstance(stored.config, EVFConfig)
    return EVFSAM.from_checkpoint(stored) if is_evf else RefSAM.from_checkpoint(stored)
