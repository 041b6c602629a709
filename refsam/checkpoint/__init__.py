"""Checkpoints: reading, writing, converting; files and state dicts only."""

from refsam.checkpoint.conversion import (
    KeyReport,
    convert_official,
    convert_sam,
    detect_config,
    text_encoder_entries,
)
from refsam.checkpoint.evf import read_evf
from refsam.checkpoint.files import (
    SAM_SOURCES,
    Checkpoint,
    Source,
    check_keys,
    file_sha256,
    is_base,
    is_sam,
    read_checkpoint,
    read_sam,
    resize_positions,
    resolve_directory,
    tensors_sha256,
    write_checkpoint,
)
from refsam.checkpoint.foreign import read_torch_file
from refsam.checkpoint.loading import load

__all__ = [
    "SAM_SOURCES",
    "Checkpoint",
    "KeyReport",
    "Source",
    "check_keys",
    "convert_official",
    "convert_sam",
    "detect_config",
    "file_sha256",
    "is_base",
    "is_sam",
    "load",
    "read_checkpoint",
    "read_evf",
    "read_sam",
    "read_torch_file",
    "resize_positions",
    "resolve_directory",
    "tensors_sha256",
    "text_encoder_entries",
    "write_checkpoint",
]
