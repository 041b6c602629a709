"""Foreign checkpoints, segment-anything's and the RefSAM authors', under this project's names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refsam.checkpoint.files import (
    SAM_SOURCES,
    Checkpoint,
    Source,
    check_keys,
    file_sha256,
    is_sam,
)
from refsam.checkpoint.foreign import (
    is_hugging_face,
    read_hugging_face,
    read_sam_file,
    read_torch_file,
)
from refsam.config import RefSAMConfig
from refsam.errors import CheckpointError, named

ExpectedTensors = Callable[[RefSAMConfig], Mapping[str, Tensor]]
"""Names and shapes of a configuration's tensors (tensors without storage will do)."""

OFFICIAL_FILES = {
    "resizer": "cross_modal_mlp.layers.",
    "mask_decoder": "mask_decoder.",
    "dense_conv": "dense_attention.conv.",
    "track_net": "tracking.",
    "image_encoder_blocks": "image_encoder.blocks.",
}
"""Prefixes of the authors' file names, and the prefix of their tensors here."""

_WIDTHS = {
    "google-t5/t5-small": 512,
    "google-t5/t5-base": 768,
    "google-t5/t5-large": 1024,
    "google-t5/t5-3b": 1024,
    "google-t5/t5-11b": 1024,
    "FacebookAI/roberta-base": 768,
    "FacebookAI/roberta-large": 1024,
}

OFFICIAL_TEXT_ENCODERS = {
    "t5-small": "google-t5/t5-small",
    "t5-3b": "google-t5/t5-3b",
    "t5-11b": "google-t5/t5-11b",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
}
"""Text encoders as the authors' file names spell them, and their Hub ids."""


@dataclass(frozen=True)
class KeyReport:
    """The names of a foreign file's entries that were used, ignored, and are still missing."""

    used: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"used: {len(self.used)} tensors"]
        for label, names in (("ignored", self.ignored), ("missing", self.missing)):
            lines.append(f"{label}: {len(names)}" + (f" ({named(names)})" if names else ""))
        return "\n".join(lines)


def detect_config(
    tensors: Mapping[str, Tensor], text_encoder: Mapping[str, Any] | None = None
) -> RefSAMConfig:
    """The configuration whose sizes SAM's tensors have; heads of the decoder are SAM's 8.

    text_encoder: entries that no SAM holds. Raises CheckpointError if these are not a SAM's tensors.
    """
    try:
        encoder, decoder = encoder_sizes(tensors), decoder_sizes(tensors)
        prompt_dim = tensors["image_encoder.neck.0.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        held = named(sorted(tensors)) or "nothing"
        raise CheckpointError(f"not a SAM checkpoint: no usable {error}; it holds {held}") from None
    values = {"image_encoder": encoder, "mask_decoder": decoder, "prompt_dim": prompt_dim}
    if text_encoder is not None:
        values["text_encoder"] = dict(text_encoder)
    return RefSAMConfig.from_dict(values)


def encoder_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Entries of `ImageEncoderConfig` for SAM's tensors; raises KeyError, ValueError or IndexError for others."""
    prefix = "image_encoder.blocks."
    embed_dim, _, patch_size, _ = tensors["image_encoder.patch_embed.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith(prefix))
    tables = [tensors[f"{prefix}{block}.attn.rel_pos_h"] for block in range(depth)]
    grid = tensors["image_encoder.pos_embed"].shape[1]
    is_global = [len(table) == 2 * grid - 1 for table in tables]
    windows = [len(t) // 2 + 1 for t, whole in zip(tables, is_global, strict=True) if not whole]
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": embed_dim // tables[0].shape[1],
        "mlp_ratio": len(tensors[f"{prefix}0.mlp.lin1.weight"]) / embed_dim,
        "window_size": windows[0] if windows else 0,
        "global_blocks": [block for block, whole in enumerate(is_global) if whole],
    }


def decoder_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Entries of `MaskDecoderConfig` for SAM's tensors; raises as `encoder_sizes`."""
    prefix = "mask_decoder.transformer.layers."
    inner_dim, dim = tensors[f"{prefix}0.cross_attn_token_to_image.q_proj.weight"].shape
    return {
        "depth": 1 + max(int(key.split(".")[3]) for key in tensors if key.startswith(prefix)),
        "mlp_dim": len(tensors[f"{prefix}0.mlp.lin1.weight"]),
        "downsample_rate": dim // inner_dim,
        "num_masks": len(tensors["mask_decoder.mask_tokens.weight"]),
        "iou_hidden_dim": len(tensors["mask_decoder.iou_prediction_head.layers.0.weight"]),
    }


def convert_sam(
    path: str | Path, expected: ExpectedTensors, text_encoder: Mapping[str, Any] | None = None
) -> tuple[Checkpoint, KeyReport]:
    """SAM's weights of any size as a checkpoint of kind `sam`: a `.pth` file, or a folder of Hugging Face's `SamModel`.

    The file may be segment-anything's `sam_vit_*.pth`, one that holds such weights in an entry (MedSAM, training programs), or
    SAM-HQ's, whose SAM is taken. text_encoder: entries of the configuration's `text_encoder`. The report names what
    RefSAM has no use for (points, boxes, masks as prompts) and, as missing, the parts that are still to be trained.
    Raises CheckpointError if this is not a SAM checkpoint.
    """
    tensors, file = _read_weights(Path(path))
    try:
        config = detect_config(tensors, text_encoder)
        model = expected(config)
        used = {key: value for key, value in tensors.items() if key in model}
        untrained = [key for key in model if not is_sam(key)]
        check_keys(used, model, untrained)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    ignored = tuple(sorted(set(tensors) - set(used)))
    missing = tuple(key for key in untrained if key not in used)
    digest = file_sha256(file)
    source = next(
        (s for s in SAM_SOURCES.values() if s.sha256 == digest), Source(Path(path).name, digest)
    )
    return Checkpoint(config, used, "sam", None, {"sam": source}), KeyReport(
        tuple(used), ignored, missing
    )


def _read_weights(path: Path) -> tuple[dict[str, Tensor], Path]:
    """SAM's tensors under its own names, and the file whose SHA-256 identifies them."""
    if not path.is_dir():
        return read_sam_file(path), path
    if is_hugging_face(path):
        return read_hugging_face(path)
    raise CheckpointError(
        f"{path}: no weights in this folder; wanted sam_vit_*.pth, or a folder of SamModel with config.json and model.safetensors"
    )


def convert_official(
    files: Iterable[str | Path],
    sam: str | Path,
    expected: ExpectedTensors,
    text_encoder: str | None = None,
) -> tuple[Checkpoint, KeyReport]:
    """The authors' per-module files on top of SAM's file as one whole checkpoint.

    files: `resizer_*`, `mask_decoder_*`, `dense_conv_*`, `track_net_*` and, where they were trained,
    `image_encoder_blocks_*` (low-rank updates are merged). text_encoder is the Hub id if the file names
    do not give. The authors' model has no intermediate levels and a fixed scale; their adapters
    were not saved, without `image_encoder_blocks_*` there are none. Raises CheckpointError.
    """
    paths = [Path(file) for file in files]
    parts = _official_parts(paths)
    base, sam_report = convert_sam(sam, expected)
    assert isinstance(base.config, RefSAMConfig)
    config = _official_config(base.config, parts, text_encoder or _text_encoder_name(paths))
    tensors = base.tensors | {key: value for part in parts.values() for key, value in part.items()}
    tensors["dense_attention.level_logits"] = torch.zeros(1)
    tensors["dense_attention.log_scale"] = torch.tensor(config.prompt_dim**-0.5).log()
    model = expected(config)
    used = {key: value for key, value in tensors.items() if key in model}
    check_keys(used, model)
    ignored = sorted({*sam_report.ignored, *(set(tensors) - set(used))})
    return Checkpoint(config, used, "full", None, base.sources), KeyReport(
        tuple(used), tuple(ignored)
    )


def _official_parts(files: list[Path]) -> dict[str, dict[str, Tensor]]:
    """Each file's tensors under this project's names, by the beginning of the file's name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        kind = next((kind for kind in OFFICIAL_FILES if file.name.startswith(kind)), None)
        if kind is None or kind in parts:
            wanted = ", ".join(f"{kind}_*" for kind in OFFICIAL_FILES)
            raise CheckpointError(f"{file}: wanted one each of {wanted}")
        state = _merge_low_rank(read_torch_file(file))
        parts[kind] = {OFFICIAL_FILES[kind] + key: value for key, value in state.items()}
    absent = [kind for kind in list(OFFICIAL_FILES)[:-1] if kind not in parts]
    if absent:
        raise CheckpointError(f"files: {', '.join(f'{kind}_*' for kind in absent)} missing")
    return parts


def _merge_low_rank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace `x.w`, `x.w_a`, `x.w_b` (the authors' low-rank layers) by the one layer they amount to."""
    merged = dict(state)
    for key in [key for key in state if key.endswith(".w_a.weight")]:
        layer = key.removesuffix(".w_a.weight")
        down, up = merged.pop(key), merged.pop(f"{layer}.w_b.weight")
        merged[f"{layer}.weight"] = merged.pop(f"{layer}.w.weight") + up @ down
        merged[f"{layer}.bias"] = merged.pop(f"{layer}.w.bias")
    return merged


def _official_config(
    base: RefSAMConfig, parts: Mapping[str, dict[str, Tensor]], text_encoder: str
) -> RefSAMConfig:
    layers = [value for key, value in parts["resizer"].items() if key.endswith("weight")]
    blocks = parts.get("image_encoder_blocks", {})
    values = base.to_dict()
    values["cross_modal_layers"] = len(layers) - 2
    values["dense_attention"] = {"hierarchical": False, "learnable_scale": False}
    values["text_encoder"] = {
        "kind": "roberta" if "roberta" in text_encoder.lower() else "t5",
        "name": text_encoder,
        "width": layers[0].shape[1],
    }
    if not any("_Adapter." in key for key in blocks):
        values["image_encoder"]["adapter_ratio"] = 0
    return RefSAMConfig.from_dict(values)


def _text_encoder_name(files: list[Path]) -> str:
    for spelling, hub_id in OFFICIAL_TEXT_ENCODERS.items():
        if any(f"_{spelling}_" in file.name for file in files):
            return hub_id
    known = ", ".join(OFFICIAL_TEXT_ENCODERS)
    raise CheckpointError(f"text_encoder: no file name holds {known}; wanted its Hub id")


def text_encoder_entries(name: str) -> dict[str, Any]:
    """The configuration's `text_encoder` for "small", a Hub id, a folder of transformers, or a name as the authors spell it.

    Raises CheckpointError where kind or width cannot be told.
    """
    if name == "small":
        return {"kind": "small"}
    name = OFFICIAL_TEXT_ENCODERS.get(name, name)
    kind = "roberta" if "roberta" in name.lower() else "t5"
    if name in _WIDTHS:
        return {"kind": kind, "name": name, "width": _WIDTHS[name]}
    try:
        path = Path(name) / "config.json"
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, "config.json"))
        found = json.loads(path.read_bytes())
        width = found.get("d_model", found.get("hidden_size"))
        kind = "roberta" if "roberta" in found.get("model_type", kind) else "t5"
        return {"kind": kind, "name": name, "width": int(width)}
    # The Hub's errors share no base class: HTTP, validation, missing cache entry, no connection.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"text_encoder: got {name!r}, wanted small, a folder or Hub id of T5 or RoBERTa ({reason})"
        ) from None
