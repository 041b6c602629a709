"""EVF-SAM: BEiT-3 reads a small copy of the frame with the expression, and its class token prompts SAM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from refsam import checkpoint
from refsam.checkpoint import Checkpoint, Source
from refsam.config import EVFConfig
from refsam.errors import CheckpointError, ExpressionError
from refsam.model import build
from refsam.model.features import ImageFeatures, TextPrompt
from refsam.model.packing import PackedModule
from refsam.model.prompted_sam import DecodeInputs, PromptedSAM, Prompts, add_image

SEMANTIC_PREFIX = "[semantic] "
START, PADDING, END = 0, 1, 2  # token ids of BEiT-3's vocabulary


class EVFSAM(PromptedSAM):
    """Referring segmentation of single frames by EVF-SAM (arXiv 2406.20076), with the interface of `RefSAM`.

    It has no memory: each frame is segmented on its own. BEiT-3 reads each expression together with the frame, so
    only its word embeddings are kept between frames.

    Args:
        config: sizes.
        tokenizer: the checkpoint's; without one, only token ids can be encoded.

    Attributes:
        semantic: put "[semantic] " before each expression: the multitask checkpoints then segment parts, stuff and
            all objects of a kind.
    """

    config: EVFConfig
    semantic = False

    def __init__(self, config: EVFConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.sources: dict[str, Source] = {}
        self.image_encoder = build.build_image_encoder(config)
        self.prompt_encoder = build.build_prompt_encoder(config, with_dense=True)
        self.mask_decoder = build.build_mask_decoder(config)
        self.beit3 = build.build_beit3(config.beit3)
        self.text_mlp = nn.Sequential(
            nn.Linear(config.beit3.width, config.beit3.width),
            nn.ReLU(),
            nn.Linear(config.beit3.width, config.prompt_dim),
        )
        self._set_pixel_statistics()

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub_options: Any) -> EVFSAM:
        """Load the model, in eval mode, from a folder or Hub id: EVF-SAM's own files or those of `save_pretrained`.

        hub_options (revision, token, cache_dir, local_files_only, force_download) go to huggingface_hub. Raises
        CheckpointError.
        """
        return cls.from_checkpoint(checkpoint.load(name, **hub_options))

    @classmethod
    def from_checkpoint(cls, stored: Checkpoint) -> EVFSAM:
        """Build the model, in eval mode, from a checkpoint in memory; raises CheckpointError if names or shapes
        differ."""
        if not isinstance(stored.config, EVFConfig):
            raise CheckpointError(f"checkpoint: got a {stored.kind} RefSAM, wanted EVF-SAM")
        with torch.device("meta"):
            model = cls(stored.config, build.read_tokenizer(stored.tokenizer))
        checkpoint.check_keys(stored.tensors, model.state_dict())
        model.load_state_dict(stored.tensors, assign=True)
        model._set_pixel_statistics()
        model.to(model.image_encoder.pos_embed.dtype)
        model.sources = dict(stored.sources)
        return model.eval()

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a checkpoint folder that `from_pretrained` reads; raises CheckpointError if it cannot be written."""
        checkpoint.write_checkpoint(Path(save_directory), self.to_checkpoint())

    def to_checkpoint(self) -> Checkpoint:
        """The checkpoint that `save_pretrained` writes."""
        text = self.tokenizer.to_str() if self.tokenizer is not None else None
        return Checkpoint(self.config, self.state_dict(), "evf", text, dict(self.sources))

    def packed_parts(self) -> list[PackedModule]:
        """BEiT-3."""
        return [self.beit3]

    def view(self, frames: Tensor) -> Tensor:
        """BEiT-3's copy of frames (B, H, W, 3) uint8 RGB: (B, 3, s, s), squeezed to a square, about -1..1.

        Bicubic without antialiasing, as EVF-SAM's `inference.py` does; values are not clamped.
        """
        side = self.config.beit3.image_size
        pixels = frames.to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 255
        if pixels.shape[2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)
        return (pixels - 0.5) / 0.5

    def encode_image(self, pixels: Tensor, view: Tensor | None = None) -> ImageFeatures:
        """Encode normalised pixels (B, 3, S, S) and `view` (B, 3, s, s) into features that all expressions share.

        Raises ValueError without a view.
        """
        if view is None:
            raise ValueError("view: got None, wanted EVFSAM.view(frames)")
        features, _ = self.image_encoder(pixels)
        embedding = features.flatten(1, 2)
        grid = features.shape[1], features.shape[2]
        return ImageFeatures(embedding, embedding[None], grid, self.beit3.embed_patches(view))

    def encode_text(self, expressions: Sequence[str]) -> TextPrompt:
        """Embed the words of P expressions; raises ExpressionError for one that the tokenizer cannot take."""
        rows = [self._ids(expression) for expression in expressions]
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence([torch.tensor(row) for row in rows], True, PADDING)
        return self.embed_text(ids, lengths)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> TextPrompt:
        """As `encode_text`, from token ids (P, T) int64; the first lengths (P,) ids of each row are valid."""
        words = self.beit3.embed_words(ids.to(self.device))
        return TextPrompt(words, words.new_zeros(len(words), self.config.prompt_dim), lengths)

    def _ids(self, expression: str) -> list[int]:
        if not isinstance(expression, str) or not expression.strip():
            raise ExpressionError(f"expression: got {expression!r}, wanted words")
        if self.tokenizer is None:
            raise CheckpointError("tokenizer: the checkpoint has none; see docs/evf_sam.md")
        text = SEMANTIC_PREFIX + expression if self.semantic else expression
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        ids = [START, *ids, END]
        if len(ids) > self.beit3.max_tokens:
            raise ExpressionError(
                f"expression: got {len(ids)} tokens, wanted at most {self.beit3.max_tokens}: {expression[:60]!r}..."
            )
        rows = self.config.beit3.vocabulary_size
        if max(ids) >= rows:
            raise CheckpointError(
                f"tokenizer: gives token {max(ids)}, the model has {rows}: it belongs to another model"
            )
        return ids

    def prompt(self, inputs: DecodeInputs) -> Prompts:
        """BEiT-3's class token as the only sparse prompt; track tokens are ignored."""
        image, text, image_index, *_ = inputs
        assert image.patches is not None
        index = None if len(image.patches) == 1 else image_index
        feature = self.beit3(image.patches, text.words, text.lengths, index)
        no_mask = self.prompt_encoder.no_mask_embed.weight
        dense = no_mask.expand(feature.shape[0], image.embedding.shape[1], -1).contiguous()
        return Prompts(
            add_image(dense, image.embedding, image_index), self.text_mlp(feature)[:, None]
        )
