"""The values that pass between the model's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class FrameSize(NamedTuple):
    """(height, width) of the frame itself and of its resized copy inside the model's square of pixels."""

    original: tuple[int, int]
    resized: tuple[int, int]


class ImageFeatures(NamedTuple):
    """The image encoder's output for B frames, for any number of expressions.

    embedding (B, N, C): unit vectors, N = h * w. levels (L, B, N, C): the embedding, then the projected
    intermediate features and the trunk's, all unit vectors. grid: (h, w). patches (B, V, D): BEiT-3's patches, for
    EVF-SAM's prompts; None for RefSAM. fine (B, F, 4h, 4w): the trunk's fine features. names (B, N, K): the trunk's
    values that `NounMatch` compares with words. Both are None without a trunk.

    EVF-SAM's embedding is SAM's own, not normalised, and the only level.
    """

    embedding: Tensor
    levels: Tensor
    grid: tuple[int, int]
    patches: Tensor | None = None
    fine: Tensor | None = None
    names: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """The features of several batches of frames, of one grid, as those of one."""
        if len(parts) == 1:
            return parts[0]
        levels = torch.cat([part.levels for part in parts], dim=1)
        more = zip(*((part.patches, part.fine, part.names) for part in parts), strict=True)
        joined = (None if maps[0] is None else torch.cat(maps) for maps in more)
        return ImageFeatures(levels[0], levels, parts[0].grid, *joined)

    def split(self) -> list[ImageFeatures]:
        """The features of each frame by itself, as views; the inverse of `cat`."""
        levels = self.levels.split(1, dim=1)
        maps = (self.patches, self.fine, self.names)
        own = ([None] * len(levels) if map_ is None else map_.split(1) for map_ in maps)
        frames = zip(levels, *own, strict=True)
        return [ImageFeatures(level[0], level, self.grid, *more) for level, *more in frames]


@dataclass(frozen=True)
class TextPrompt:
    """P expressions as prompts.

    words (P, T, C) and sentence (P, C) are unit vectors (EVF-SAM: words (P, T, D) as BEiT-3 takes them,
    sentence zeros); the first lengths[i] words of row i are valid, the rest is padding and may hold anything.
    Words are trimmed to the longest row. lengths (P,)
    int64 may be given on the host, which saves a synchronisation; it is kept on the words' device.
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
        """The expressions with these indices, in this order."""
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
    """The decoder's output for P expressions.

    logits (P, 4h, 4w): mask logits over the model's padded square. iou (P,): predicted IoU.
    object_token (P, C): the decoder's output for mask token 0. track_token (P, C): what the next
    frame is given.
    """

    logits: Tensor
    iou: Tensor
    object_token: Tensor
    track_token: Tensor
