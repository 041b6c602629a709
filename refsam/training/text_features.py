"""Caches a frozen text encoder's outputs for all steps, processes and runs."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from refsam.checkpoint import tensors_sha256
from refsam.model.pretrained_text_encoder import PretrainedTextEncoder
from refsam.model.text_encoder import CachedTextEncoder, EncodedText
from refsam.runtime.files import only_writer, replace_file

_IN_MEMORY = 4096


class TextFeatures:
    """Called like the text encoder, whose output it keeps in memory and, with `folder`, on disk.

    Each expression is encoded alone and without autocast, so its tokens do not depend on the rest of the batch: a run
    that is resumed, or continued by other processes, sees the same bits. On disk every expression is a separate file below
    a folder named after the encoder and its weights. Files are written under another name and renamed, so processes may
    share the folder; an unreadable file is written again.
    """

    def __init__(self, encoder: CachedTextEncoder, folder: str | Path | None = None) -> None:
        self.encoder = encoder
        self.folder = None if folder is None else Path(folder) / identity(encoder)
        self._tokens = lru_cache(_IN_MEMORY)(self._read_or_encode)
        # Those who call the encoder itself, such as validation, use the cache too.
        encoder.kept = self._read_kept

    def __call__(self, expressions: Sequence[str]) -> EncodedText:
        """P expressions to tokens (P, T, Ct), float32 on the host; raises ExpressionError."""
        rows = [self._tokens(expression) for expression in expressions]
        lengths = torch.tensor([len(row) for row in rows])
        return EncodedText(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)

    def encode_all(
        self, expressions: Iterable[str], advance: Callable[[], None] = lambda: None
    ) -> int:
        """Write the tokens of every expression to the disk, if there is a folder; returns the number of new ones.

        One process does this at a time, so that a large encoder is loaded only once; it is unloaded at the end.
        """
        if self.folder is None:
            return 0
        new = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        with only_writer(self.folder / "all", wait=True):
            for expression in dict.fromkeys(expressions):
                path = self.file(expression)
                if path is not None and not path.is_file():
                    self._read_or_encode(expression)
                    new += 1
                advance()
        if isinstance(self.encoder, PretrainedTextEncoder):
            self.encoder.unload()
        return new

    def _read_kept(self, expression: str) -> EncodedText | None:
        """Read an expression's features from the disk, None if they are not there."""
        tokens = _read(self.file(expression))
        return None if tokens is None else EncodedText(tokens[None], torch.tensor([len(tokens)]))

    def file(self, expression: str) -> Path | None:
        """The file of an expression's features; None without a folder."""
        if self.folder is None:
            return None
        name = hashlib.sha256(expression.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read_or_encode(self, expression: str) -> Tensor:
        """The tokens (T, Ct) of one expression."""
        path = self.file(expression)
        if (tokens := _read(path)) is not None:
            return tokens
        device = next(chain(self.encoder.parameters(), self.encoder.buffers())).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            encoded = self.encoder([expression])
        tokens = encoded.tokens[0, : int(encoded.lengths[0])].float().cpu()
        if path is not None:
            self._keep(path, tokens)
        return tokens

    def _keep(self, path: Path, tokens: Tensor) -> None:
        """Write tokens to the disk; if the folder is full or read-only, they are computed again next time."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, save({"tokens": tokens.contiguous()}))
        except OSError as error:
            warnings.warn(f"text_cache: {path} cannot be written ({error.strerror})", stacklevel=2)


def identity(encoder: CachedTextEncoder) -> str:
    """A folder name that is unique to the encoder and its weights."""
    if not isinstance(encoder, PretrainedTextEncoder):
        tokenizer = getattr(encoder, "tokenizer", None)
        words = tokenizer.to_str() if tokenizer is not None else ""
        weights = tensors_sha256(encoder.state_dict())
        return f"small-{hashlib.sha256((words + weights).encode()).hexdigest()[:32]}"
    source = encoder.source()
    if source.sha256 is None:  # not on this machine yet, or in several files
        _, loaded = encoder.load()
        source = encoder.source()
    weights = source.sha256 or tensors_sha256(loaded.state_dict())
    return f"{encoder.name.strip('/').replace('/', '--')}-{weights[:32]}"


def _read(path: Path | None) -> Tensor | None:
    try:
        return None if path is None else load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None
