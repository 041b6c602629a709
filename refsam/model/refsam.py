"""RefSAM: a frame and some expressions in, one mask per expression out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.config import RefSAMConfig
from refsam.model import build
from refsam.model.adapter import Adapter
from refsam.model.text_encoder import EncodedText

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class FrameSize(NamedTuple):
    """(height, width) of the frame itself and of its resized copy inside the model's square."""

    original: tuple[int, int]
    resized: tuple[int, int]


class ImageFeatures(NamedTuple):
    """What the image encoder gives for B frames; one set serves any number of expressions.

    embedding (B, N, C): unit vectors, N = h * w. levels (L, B, N, C): the embedding, then the
    projected intermediate features, unit vectors all. grid: (h, w).
    """

    embedding: Tensor
    levels: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class TextPrompt:
    """P expressions as prompts.

    words (P, T, C) and sentence (P, C) are unit vectors; the first lengths[i] words of row i are valid,
    the rest is padding and may hold anything. Words are trimmed to the longest row. lengths (P,)
    int64 may be given on the host, which spares a synchronisation, and is kept beside the words.
    unknown: per expression, the words that the text encoder does not know.
    """

    words: Tensor
    sentence: Tensor
    lengths: Tensor
    unknown: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        count, longest = len(self.lengths), int(self.lengths.max()) if len(self.lengths) else 0
        if self.words.ndim != 3 or len(self.words) != count or longest > self.words.shape[1]:
            raise ValueError(
                f"words, lengths: got shape {tuple(self.words.shape)} and "
                f"{self.lengths.tolist()}, wanted (P, T, C) and P lengths up to T"
            )
        object.__setattr__(self, "words", self.words[:, :longest])
        object.__setattr__(self, "lengths", self.lengths.to(self.words.device))
        object.__setattr__(self, "unknown", tuple(self.unknown) or ((),) * count)

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, indices: Sequence[int]) -> TextPrompt:
        """The expressions at these places, in this order."""
        picked = list(indices)
        unknown = tuple(self.unknown[index] for index in picked)
        return TextPrompt(self.words[picked], self.sentence[picked], self.lengths[picked], unknown)

    @staticmethod
    def cat(parts: Sequence[TextPrompt]) -> TextPrompt:
        """One set of prompts out of several, padded with zeros to the longest."""
        longest = max(part.words.shape[1] for part in parts)
        words = [F.pad(part.words, (0, 0, 0, longest - part.words.shape[1])) for part in parts]
        return TextPrompt(
            torch.cat(words),
            torch.cat([part.sentence for part in parts]),
            torch.cat([part.lengths for part in parts]),
            tuple(unknown for part in parts for unknown in part.unknown),
        )


class MaskOutput(NamedTuple):
    """What the decoder gives for P expressions.

    logits (P, 4h, 4w): mask logits over the model's padded square. iou (P,): predicted IoU.
    object_token (P, C): the decoder's output for mask token 0. track_token (P, C): what the next
    frame is given.
    """

    logits: Tensor
    iou: Tensor
    object_token: Tensor
    track_token: Tensor


class RefSAM(nn.Module):
    """Referring video object segmentation on SAM (arXiv 2307.00997).

    tokenizer is the vocabulary of the small text encoder; None gives a short list of common words.
    With `config.frozen` SAM's ViT and positional encoding and the text encoder do not train.
    """

    def __init__(self, config: RefSAMConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = build.build_image_encoder(config)
        self.prompt_encoder = build.build_prompt_encoder(config)
        self.text_encoder = build.build_text_encoder(config, tokenizer)
        self.cross_modal_mlp = build.build_cross_modal_mlp(config)
        self.dense_attention = build.build_dense_attention(config)
        self.mask_decoder = build.build_mask_decoder(config)
        self.tracking = build.build_tracking(config)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), False)
        if config.frozen:
            self.freeze_pretrained()

    @property
    def image_size(self) -> int:
        """The side S, in pixels, of the square that frames are resized into."""
        return self.config.image_encoder.image_size

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pixel_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return self.pixel_mean.dtype

    def freeze_pretrained(self) -> None:
        """Train adapters, cross-modal MLP, dense attention, decoder and tracking only (section 3.2)."""
        self.requires_grad_(True)
        self.image_encoder.requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        for module in self.image_encoder.modules():
            if isinstance(module, Adapter):
                module.requires_grad_(True)
        self.train(self.training)

    def frozen_modules(self) -> list[nn.Module]:
        """The modules that have parameters of which none is trained."""
        return [
            module
            for module in self.modules()
            if (parameters := list(module.parameters()))
            and not any(parameter.requires_grad for parameter in parameters)
        ]

    def train(self, mode: bool = True) -> RefSAM:
        """Set training mode; frozen modules stay in eval mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.training = False
        return self

    def preprocess(
        self, frames: Tensor, image_size: int | None = None
    ) -> tuple[Tensor, FrameSize]:
        """Frames (B, H, W, 3) uint8 RGB to normalised pixels (B, 3, S, S) and their sizes.

        image_size takes another S than the model's own, a multiple of the patch size.

        The longest side becomes S by antialiased bilinear resizing of 8-bit values, SAM's mean and
        standard deviation apply to 0-255, and zeros pad right and bottom (segment-anything,
        utils/transforms.py and modeling/sam.py). Raises ValueError for other shapes or dtypes.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
            raise ValueError(
                f"frames: got {frames.dtype} of shape {tuple(frames.shape)}, "
                "wanted uint8 of shape (B, H, W, 3)"
            )
        if 0 in frames.shape[1:3]:
            raise ValueError(f"frames: got empty frames of shape {tuple(frames.shape)}")
        image_size = image_size or self.image_size
        height, width = frames.shape[1:3]
        scale = image_size / max(height, width)
        resized = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        pixels = frames.to(self.device).permute(0, 3, 1, 2)
        if resized != (height, width):
            pixels = _resize_bytes(pixels, resized)
        pixels = (pixels.to(self.dtype) - self.pixel_mean) / self.pixel_std
        padding = (0, image_size - resized[1], 0, image_size - resized[0])
        return F.pad(pixels, padding), FrameSize((height, width), resized)

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Normalised pixels (B, 3, S, S) to features that any number of expressions share."""
        features, intermediates = self.image_encoder(pixels)
        embedding = F.normalize(features.flatten(1, 2), dim=-1)
        levels = self.dense_attention.project(embedding, intermediates)
        return ImageFeatures(embedding, levels, (features.shape[1], features.shape[2]))

    def encode_text(self, expressions: Sequence[str]) -> TextPrompt:
        """P expressions to prompts; raises ExpressionError for one that cannot be understood."""
        return self.project_text(self.text_encoder(expressions))

    def project_text(self, encoded: EncodedText) -> TextPrompt:
        """The text encoder's output through the cross-modal MLP."""
        tokens = encoded.tokens.to(self.device, self.dtype)
        lengths = encoded.lengths.to(self.device, non_blocking=True)
        words, sentence = self.cross_modal_mlp(tokens, lengths)
        return TextPrompt(words, sentence, encoded.lengths, encoded.unknown)

    def decode(
        self,
        image: ImageFeatures,
        text: TextPrompt,
        image_index: Tensor | None = None,
        track: Tensor | None = None,
        track_valid: Tensor | None = None,
    ) -> MaskOutput:
        """Masks of P expressions in the frames that image_index (P,) int64 names.

        image_index None: all in the only frame. track (P, C) is the previous frame's `track_token`;
        None on the first frame. track_valid (P,) bool: which expressions have one; None means all.
        Raises ValueError for shapes that do not fit.
        """
        image_index = self._check_decode(image, text, image_index, track, track_valid)
        dense = self.dense_attention(
            image.levels,
            torch.cat([text.sentence[:, None], text.words], dim=1),
            text.lengths + 1,
            image_index,
        )
        sparse, lengths = text.words, text.lengths
        if track is not None:
            if track_valid is None:
                track_valid = torch.ones_like(lengths, dtype=torch.bool)
            track = torch.where(track_valid[:, None], track, 0.0).to(sparse.dtype)
            sparse, lengths = _append_token(sparse, lengths, track, track_valid)
        logits, iou, mask_tokens = self.mask_decoder(
            image.embedding[image_index] + dense,
            self.prompt_encoder.pe_layer(*image.grid).to(dense.dtype),
            sparse,
            lengths,
            image.grid,
        )
        object_token = mask_tokens[:, 0]
        track_token = self.tracking(object_token, track)
        return MaskOutput(logits[:, 0], iou[:, 0], object_token, track_token)

    def _check_decode(
        self,
        image: ImageFeatures,
        text: TextPrompt,
        image_index: Tensor | None,
        track: Tensor | None,
        track_valid: Tensor | None,
    ) -> Tensor:
        count, channels = text.sentence.shape
        if image_index is None:
            if len(image.embedding) != 1:
                raise ValueError(f"image_index: got None for {len(image.embedding)} frames")
            image_index = torch.zeros_like(text.lengths)
        if image_index.shape != (count,):
            raise ValueError(
                f"image_index: got shape {tuple(image_index.shape)}, wanted ({count},)"
            )
        if track is not None and track.shape != (count, channels):
            raise ValueError(f"track: got shape {tuple(track.shape)}, wanted ({count}, {channels})")
        if track_valid is not None and (track is None or track_valid.shape != (count,)):
            raise ValueError(
                f"track_valid: got shape {tuple(track_valid.shape)}, wanted ({count},) and a track"
            )
        return image_index


def _resize_bytes(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of (B, 3, H, W) uint8; only the CPU does it in whole numbers."""
    if pixels.device.type == "cpu":
        return F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return F.interpolate(pixels.float(), size, mode="bilinear", antialias=True).round_()


def _append_token(
    words: Tensor, lengths: Tensor, token: Tensor, has_token: Tensor
) -> tuple[Tensor, Tensor]:
    """Put token (P, C) right behind the valid words of (P, T, C), where has_token (P,) says so."""
    padded = F.pad(words, (0, 0, 0, 1))
    positions = torch.arange(padded.shape[1], device=words.device)
    is_place = (positions == lengths[:, None]) & has_token[:, None]
    return torch.where(is_place[..., None], token[:, None], padded), lengths + has_token
