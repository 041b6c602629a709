"""Frozen text encoders of `transformers`, which is imported when one is first used."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refsam.checkpoint import Source, file_sha256
from refsam.errors import ExpressionError, UserError
from refsam.model.text_encoder import CachedTextEncoder, EncodedText

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


class PretrainedTextEncoder(CachedTextEncoder):
    """A frozen encoder of `transformers`, which is imported and loaded when first used.

    Its weights are not saved in checkpoints: they are no parameters of this module, but follow its device and
    dtype.
    """

    architecture: str

    def __init__(self, name: str, width: int, max_tokens: int = 512) -> None:
        super().__init__(width)
        self.name = name
        self.max_tokens = max_tokens
        self.register_buffer("placement", torch.empty(0), persistent=False)
        self._loaded: list[Any] = []

    def source(self) -> Source:
        """Name of the encoder and SHA-256 of its weights, None where they are not on this machine."""
        path = self._weights_file()
        digest = file_sha256(path) if path is not None else None
        return Source(self.name, digest, f"https://huggingface.co/{self.name}")

    def _weights_file(self) -> Path | None:
        if Path(self.name).is_dir():
            candidates = [Path(self.name) / name for name in WEIGHTS_FILES]
        else:
            from huggingface_hub import try_to_load_from_cache

            cached = (try_to_load_from_cache(self.name, name) for name in WEIGHTS_FILES)
            candidates = [Path(path) for path in cached if isinstance(path, str)]
        return next((path for path in candidates if path.is_file()), None)

    def load(self) -> tuple[Any, nn.Module]:
        """The tokenizer and the encoder, read from the Hub's cache, the Hub or a folder.

        Raises UserError if transformers is missing or the name cannot be loaded.
        """
        with self._lock:
            if not self._loaded:
                self._loaded = [*self._read()]
        tokenizer, encoder = self._loaded
        return tokenizer, encoder

    def unload(self) -> None:
        """Free the encoder's memory; the next use reads it again."""
        with self._lock:
            self._loaded = []

    def _read(self) -> tuple[Any, nn.Module]:
        try:
            import transformers
        except ImportError:
            raise UserError(
                f"text encoder {self.name!r} needs transformers: pip install 'refsam[text]'"
            ) from None
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.name)
            encoder = getattr(transformers, self.architecture).from_pretrained(self.name)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"text encoder {self.name!r} cannot be loaded: {reason}") from None
        if encoder.config.hidden_size != self.width:
            raise UserError(
                f"text encoder {self.name!r}: got width {encoder.config.hidden_size}, "
                f"wanted {self.width} as configured"
            )
        self._check_weights()
        encoder.requires_grad_(False).eval()
        return tokenizer, encoder.to(self.placement.device, self.placement.dtype)

    def _check_weights(self) -> None:
        path = self._weights_file() if self.expected_sha256 else None
        if path is not None and (found := file_sha256(path)) != self.expected_sha256:
            raise UserError(
                f"text encoder {self.name!r}: weights have SHA-256 {found}, the checkpoint was "
                f"trained with {self.expected_sha256}"
            )

    def encode(self, expressions: Sequence[str]) -> EncodedText:
        """P expressions to tokens (P, T, width), pads masked; raises ExpressionError if too long."""
        tokenizer, encoder = self.load()
        batch = tokenizer(list(expressions), padding=True, return_tensors="pt")
        lengths = batch.attention_mask.sum(1)
        for expression, length in zip(expressions, lengths.tolist(), strict=True):
            if length > self.max_tokens:
                raise ExpressionError(
                    f"expression: got {length} tokens, wanted at most {self.max_tokens}: "
                    f"{expression[:60]!r}..."
                )
        device = self.placement.device
        with torch.no_grad():
            tokens = encoder(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
            ).last_hidden_state
        return EncodedText(tokens, lengths)

    def weights_key(self) -> Hashable:
        """Name, device and dtype: the weights themselves never change."""
        return self.name, self.placement.device, self.placement.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> PretrainedTextEncoder:
        super()._apply(fn, recurse)
        if self._loaded:
            self._loaded[1]._apply(fn)
        return self


class T5TextEncoder(PretrainedTextEncoder):
    """The encoder of T5 (paper, section 3.3: T5-3B, width 1024)."""

    architecture = "T5EncoderModel"


class RobertaTextEncoder(PretrainedTextEncoder):
    """RoBERTa, the alternative in the authors' code."""

    architecture = "RobertaModel"
