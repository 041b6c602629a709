"""Checkpoints: files and state dicts, and nothing of the model itself.

A checkpoint is a folder: `config.json` (what it is and what it is built on), `model.safetensors` and,
for the small text encoder, `tokenizer.json`. Nothing but safetensors is read, except by the two
conversions and for SAM's own file, where torch's restricted loader (`weights_only=True`) reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from refsam.checkpoint.foreign import read_safetensors, read_sam_file
from refsam.config import EVFConfig, RefSAMConfig, config_from_dict, config_to_dict
from refsam.errors import CheckpointError, named
from refsam.runtime.files import follow_umask

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
BUNDLED = Path(__file__).parents[1] / "weights"
SAM_DIR_VARIABLE = "REFSAM_SAM_DIR"
KINDS = ("full", "delta", "sam", "evf")
# EVF-SAM's repositories hold either kind of weights, in one file or several, and either kind of tokenizer.
HUB_FILES = (CONFIG_FILE, "*.safetensors", "*.index.json", TOKENIZER_FILE, "*.spm", "*.bpe.model")
OLD_HUB_WEIGHTS = "pytorch_model*.bin"


@dataclass(frozen=True)
class Source:
    """A file that a checkpoint needs: its name, its SHA-256 and where to get it."""

    name: str
    sha256: str | None = None
    url: str | None = None

    def __str__(self) -> str:
        where = f"; get it from {self.url}" if self.url else ""
        return f"{self.name} (SHA-256 {self.sha256 or 'not recorded'}{where})"


def _official(name: str, sha256: str) -> Source:
    return Source(name, sha256, f"https://dl.fbaipublicfiles.com/segment_anything/{name}")


SAM_SOURCES = {
    "vit_b": _official(
        "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": _official(
        "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": _official(
        "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
}
"""The files that segment-anything publishes."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint folder.

    kind: `full` (everything but a pretrained text encoder), `delta` (what was trained) or `sam` (SAM's
    parts alone), of RefSAM all of them; or `evf`, EVF-SAM. tokenizer: the JSON text of the small text
    encoder's or EVF-SAM's tokenizer. sources: what it is built on, under `sam`, `text_encoder` and `evf`.
    """

    config: RefSAMConfig | EVFConfig
    tensors: dict[str, Tensor]
    kind: str = "full"
    tokenizer: str | None = None
    sources: dict[str, Source] = field(default_factory=dict)


def resolve_directory(name: str | Path, **hub_options: Any) -> Path:
    """The folder of a bundled name, of a path or, downloaded if need be, of a Hub id.

    hub_options go to `huggingface_hub.snapshot_download`. Raises CheckpointError if there is none.
    """
    if isinstance(name, str) and (BUNDLED / name / CONFIG_FILE).is_file():
        return BUNDLED / name
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(
            f"checkpoint: {path} is a file, wanted a folder (see `refsam convert --help` for .pth)"
        )
    names = sorted(entry.parent.name for entry in BUNDLED.glob(f"*/{CONFIG_FILE}"))
    wanted = f"wanted a bundled name ({', '.join(names) or 'none here'}), a folder or a Hub id"
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"checkpoint: got {str(name)!r}, {wanted}")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES], **hub_options))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=[OLD_HUB_WEIGHTS], **hub_options)
        return folder
    # The Hub's errors share no base class: HTTP, validation, missing cache entry, no connection.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"checkpoint: got {name!r}, {wanted}; Hub: {reason}. Without a connection: copy {CONFIG_FILE}, the weights "
            f"and the tokenizer from https://huggingface.co/{name} into a folder and give that"
        ) from None


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """Read a folder that `write_checkpoint` wrote.

    Raises CheckpointError where a file is missing, corrupt or not ours.
    """
    directory = Path(directory)
    try:
        header = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: cannot be read ({error})") from None
    if not isinstance(header, dict) or header.get("kind") not in KINDS or "config" not in header:
        raise CheckpointError(f"{directory}: not a checkpoint of refsam")
    tokenizer = directory / TOKENIZER_FILE
    config: RefSAMConfig | EVFConfig
    if header["kind"] == "evf":
        config = config_from_dict(EVFConfig, header["config"])
    else:
        config = RefSAMConfig.from_dict(header["config"])
    try:
        sources = {key: Source(**value) for key, value in header.get("sources", {}).items()}
        text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None
    except (AttributeError, TypeError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory}: damaged ({error})") from None
    needs_tokenizer = isinstance(config, EVFConfig) or config.text_encoder.kind == "small"
    if needs_tokenizer and text is None and header["kind"] != "sam":
        raise CheckpointError(f"{directory}: {TOKENIZER_FILE} is missing")
    tensors = read_safetensors(directory / WEIGHTS_FILE)
    return Checkpoint(config, tensors, header["kind"], text, sources)


def write_checkpoint(directory: str | Path, checkpoint: Checkpoint) -> None:
    """Write a folder; existing files are replaced, each in one step.

    Everything is written under a temporary name first, so that no partial file is ever seen. Raises
    CheckpointError if the folder cannot be written.
    """
    directory = Path(directory)
    partial = directory.parent / f".{directory.name}.{os.getpid()}.partial"
    header = {
        "kind": checkpoint.kind,
        "config": config_to_dict(checkpoint.config),
        "sources": {key: asdict(source) for key, source in checkpoint.sources.items()},
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()}
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        if checkpoint.tokenizer is not None:
            (partial / TOKENIZER_FILE).write_text(checkpoint.tokenizer, encoding="utf-8")
        (partial / CONFIG_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        follow_umask(partial / WEIGHTS_FILE)
        if directory.exists():
            for name in (WEIGHTS_FILE, TOKENIZER_FILE, CONFIG_FILE):
                if (partial / name).exists():
                    os.replace(partial / name, directory / name)
        else:
            os.rename(partial, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits; raises CheckpointError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def is_base(name: str) -> bool:
    """Whether a delta leaves this parameter to SAM's file."""
    is_encoder = name.startswith(("image_encoder.", "prompt_encoder.pe_layer."))
    return is_encoder and "_Adapter." not in name


def is_sam(name: str) -> bool:
    """Whether SAM's file holds this parameter."""
    return is_base(name) or name.startswith("mask_decoder.")


def find_sam(source: Source | None, argument: str | Path | None = None) -> Path:
    """Find the SAM file that a delta is built on: the argument, else in REFSAM_SAM_DIR.

    Raises CheckpointError that names file, SHA-256 and where to get it.
    """
    wanted = source or "SAM's file (not recorded which)"
    if argument is not None:
        if not Path(argument).exists():
            raise CheckpointError(f"sam: {argument} does not exist, wanted {wanted}")
        return Path(argument)
    folder = os.environ.get(SAM_DIR_VARIABLE)
    if folder and source is not None:
        for name in (source.name, Path(source.name).stem):
            if (Path(folder) / name).exists():
                return Path(folder) / name
    where = f"not in {folder}" if folder else f"{SAM_DIR_VARIABLE} is not set"
    raise CheckpointError(
        f"this checkpoint is a delta and needs {wanted}: {where}; or give it with sam=PATH (--sam PATH)"
    )


def read_sam(path: Path, wanted: Source | None = None) -> dict[str, Tensor]:
    """SAM's tensors under the model's names, from its `.pth` file or a converted folder.

    Raises CheckpointError if it is not the file that `wanted` records.
    """
    if path.is_dir():
        stored = read_checkpoint(path)
        found = stored.sources.get("sam", Source(path.name))
        tensors = stored.tensors
    else:
        found = Source(path.name, file_sha256(path))
        tensors = read_sam_file(path) if _is_same(found, wanted) else {}
    if not _is_same(found, wanted):
        raise CheckpointError(f"sam: {path} has SHA-256 {found.sha256}, wanted {wanted}")
    return tensors


def _is_same(found: Source, wanted: Source | None) -> bool:
    return wanted is None or wanted.sha256 is None or found.sha256 == wanted.sha256


def resize_positions(tensors: Mapping[str, Tensor], config: RefSAMConfig) -> dict[str, Tensor]:
    """A state dict whose position tables fit the configuration's image size.

    The absolute table is interpolated bicubically, relative ones linearly, as segment-anything's
    `get_rel_pos` does at run time; all others stay.
    """
    encoder, result = config.image_encoder, dict(tensors)
    grid = encoder.image_size // encoder.patch_size
    table = result["image_encoder.pos_embed"]
    if table.shape[1:3] != (grid, grid):
        resized = F.interpolate(table.permute(0, 3, 1, 2).float(), (grid, grid), mode="bicubic")
        result["image_encoder.pos_embed"] = resized.permute(0, 2, 3, 1).to(table.dtype)
    for block in encoder.global_blocks:
        for axis in "hw":
            key = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            rows = result[key].float().T[None]
            if rows.shape[-1] != 2 * grid - 1:
                resized = F.interpolate(rows, 2 * grid - 1, mode="linear")
                result[key] = resized[0].T.to(result[key].dtype)
    return result


def check_keys(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], optional: Iterable[str] = ()
) -> None:
    """Raise CheckpointError unless names and shapes are those expected; optional may be missing."""
    missing = sorted(set(expected) - set(tensors) - set(optional))
    unexpected = sorted(set(tensors) - set(expected))
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in tensors and tensors[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(names)} {label} ({named(names)})"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"checkpoint does not fit the configuration: {'; '.join(problems)}")
