"""Weights written by other programs: torch's files, nested or not, and folders of Hugging Face's `SamModel`.

Nothing in a file is executed: all classes except tensors and plain values are replaced by empty stand-ins.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refsam.errors import CheckpointError

_HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
# Entries in which training programs keep the state dict, the likeliest first.
_ENTRIES = ("model_state", "model_state_dict", "state_dict", "model", "net", "module")
# A tensor that every SAM has. A prefix before its name was added to all names by a wrapper.
_ANCHOR = "image_encoder.patch_embed.proj.weight"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
# Parts that torch's wrappers add to names; no SAM has a module with such a name.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_MOST_LEVELS = 4
# Names of `SamModel` and segment-anything's, tried in this order.
_HUGGING_FACE_NAMES = (
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)  # fmt: skip


class _StandIn:
    """Stands for any class that a file names: it accepts all calls and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.pth` file, at its top or in an entry, read by torch's restricted loader.

    Raises CheckpointError if it is missing, corrupt or holds no tensors by name.
    """
    check_content(path)
    try:
        with torch.serialization.safe_globals(_stand_ins(path)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch does not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    # torch's reader raises nearly any error on bytes that torch did not write.
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)})") from None
    return {
        ".".join(part for part in str(key).split(".") if part not in _WRAPPERS): value
        for key, value in _state_dict(content, path).items()
    }


def _reason(error: Exception) -> str:
    """Why torch's restricted loader failed, in one line, without its advice to load a file that may execute anything."""
    text = _ESCAPES.sub("", str(error)).strip()
    if called := re.search(r"GLOBAL (\S+)", text):
        return f"it would call {called[1]}, which is never done: save the state dict alone"
    if "TorchScript" in text:
        return "it is a TorchScript program: save its state dict"
    if "PytorchStreamReader" in text:
        return f"{text.partition('. ')[0]}: download it again"
    return "torch.save did not write it"


def read_sam_file(path: Path) -> dict[str, Tensor]:
    """SAM's tensors from a `.pth` file under SAM's names, without a wrapper's prefixes and other entries.

    Raises CheckpointError as `read_torch_file` does.
    """
    state = read_torch_file(path)
    prefix = next((key.removesuffix(_ANCHOR) for key in state if key.endswith(_ANCHOR)), "")
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def _stand_ins(path: Path) -> list[Any]:
    """A stand-in for every class that a file names and torch does not allow."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of torch before 1.6: the usual companion of weights alone
        names = ["argparse.Namespace"]
    return [(type(name, (_StandIn,), {}), name) for name in names]


def _state_dict(content: Any, path: Path, level: int = 1) -> dict[str, Tensor]:
    """The tensors by name in a file's content, at its top or up to two entries deep."""
    refused = f"{path}: cannot be read: not a state dict (tensors by name)"
    if isinstance(content, _StandIn):
        raise CheckpointError(
            f"{refused}, but a {type(content).__name__}, whose code is never run: save its state_dict()"
        )
    if not isinstance(content, Mapping):
        raise CheckpointError(refused)
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    nested = {key: value for key, value in content.items() if _has_tensors(value)}
    if tensors and not nested:
        return tensors
    chosen = next((key for key in _ENTRIES if key in nested), None)
    if chosen is None and len(nested) == 1:
        chosen = next(iter(nested))
    if chosen is None or level == _MOST_LEVELS:
        keys = ", ".join(map(repr, list(content)[:8])) or "nothing"
        raise CheckpointError(
            f"{refused}: it holds {keys}; wanted one of {', '.join(_ENTRIES)} with tensors by name"
        )
    return _state_dict(nested[chosen], path, level + 1)


def _has_tensors(value: Any, level: int = 1) -> bool:
    """Whether a mapping holds tensors by name, or one that does; an optimizer numbers its own."""
    is_named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if not is_named or level > _MOST_LEVELS:
        return False
    return any(isinstance(v, Tensor) or _has_tensors(v, level + 1) for v in value.values())


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is that of a `transformers` model."""
    return (
        any(
            (path / f"{name}{end}").is_file()
            for name in _HUGGING_FACE_FILES
            for end in ("", ".index.json")
        )
        and (path / "config.json").is_file()
    )


def read_hugging_face(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a `SamModel`'s folder under segment-anything's names, and the file that says which weights they are.

    Raises CheckpointError for another model, and for files that are missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read ({error})") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("sam", "sam_hq"):
        raise CheckpointError(f"{folder}: got a model of type {kind!r}, wanted sam")
    files, said_by = _weight_files(folder)
    return _renamed(_read_files(files)), said_by


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder: safetensors or torch's files, one or those that an index names.

    Raises CheckpointError for files that are missing or damaged.
    """
    return _read_files(_weight_files(folder)[0])


def _weight_files(folder: Path) -> tuple[list[Path], Path]:
    """The files with the weights, and the one that says which weights they are: the index, or the only file."""
    for name in _HUGGING_FACE_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / file for file in _named_files(index)], index
        if (folder / name).is_file():
            return [folder / name], folder / name
    raise CheckpointError(f"{folder}: no weights, wanted {' or '.join(_HUGGING_FACE_FILES)}")


def _named_files(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error!r})") from None
    for name in names:
        if Path(str(name)).name != name:
            raise CheckpointError(f"{index}: got the file {name!r}, wanted one beside it")
    return names


def _read_files(files: Iterable[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= (
            read_safetensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
        )
    return tensors


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        name = _numbered_layer(name, tensors)
        for pattern, replacement in _HUGGING_FACE_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _numbered_layer(name: str, tensors: Mapping[str, Tensor]) -> str:
    """A layer of an MLP, of which `proj_in` is the first and `proj_out` the last, by its number; other names stay."""
    match = re.fullmatch(r"(.+)\.(proj_in|proj_out|layers\.(\d+))\.(weight|bias)", name)
    if match is None or f"{match[1]}.proj_in.weight" not in tensors:
        return name
    between = sum(
        re.fullmatch(rf"{re.escape(match[1])}\.layers\.\d+\.weight", key) is not None
        for key in tensors
    )
    number = {"proj_in": 0, "proj_out": between + 1}.get(match[2], int(match[3] or 0) + 1)
    return f"{match[1]}.layers.{number}.{match[4]}"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, on the host; raises CheckpointError if it is missing or corrupt."""
    try:
        # safetensors reports a file without read permission as missing.
        open(path, "rb").close()
        return load_file(path)
    except (OSError, SafetensorError) as error:
        check_content(path)
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def check_content(path: Path) -> None:
    """Raise CheckpointError for a failed download in place of weights: a web page, a pointer, an empty or partial file."""
    try:
        with open(path, "rb") as file:
            begin = file.read(512).lstrip().lower()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not begin:
        raise CheckpointError(f"{path}: is empty, download it again")
    if begin.startswith((b"<!doctype html", b"<html", b"<?xml")) or b"<html" in begin:
        raise CheckpointError(
            f"{path}: is a web page (HTML), no weights: the download was answered with a page; open the link in a browser"
        )
    if begin.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a pointer of Git LFS, no weights: run git lfs pull")
