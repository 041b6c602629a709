"""SAM's image encoder and mask decoder with prompts made of expressions: the interface of RefSAM and EVF-SAM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.checkpoint import Source
from refsam.config import EVFConfig, RefSAMConfig
from refsam.model.features import FrameSize, ImageFeatures, MaskOutput, TextPrompt
from refsam.model.image_encoder import ImageEncoder
from refsam.model.mask_decoder import MaskDecoder, PromptEncoder
from refsam.model.packing import PackedModule, Packing
from refsam.model.preprocessing import preprocess

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class Prompts(NamedTuple):
    """Prompts of P expressions, as the mask decoder takes them.

    image (P, N, C): the embedding with the dense prompts added. sparse (P, T, C): sparse prompts; the first lengths (P,)
    of each row are valid, None means all. track (P, C): the track tokens that are among them, None without any.
    match (P, N): how well each location matches the noun, None without a trunk.
    """

    image: Tensor
    sparse: Tensor
    lengths: Tensor | None = None
    track: Tensor | None = None
    match: Tensor | None = None


class DecodeInputs(NamedTuple):
    """The arguments of `PromptedSAM.decode`, with each expression's frame."""

    image: ImageFeatures
    text: TextPrompt
    image_index: Tensor
    track: Tensor | None
    track_valid: Tensor | None

    def check(self, channels: int) -> None:
        """Raise ValueError for shapes that do not fit; track tokens have that many channels."""
        (count,) = self.text.lengths.shape
        _, _, index, track, valid = self
        if index.shape != (count,):
            raise ValueError(f"image_index: got shape {tuple(index.shape)}, wanted ({count},)")
        if track is not None and track.shape != (count, channels):
            raise ValueError(f"track: got shape {tuple(track.shape)}, wanted ({count}, {channels})")
        if valid is not None and (track is None or valid.shape != (count,)):
            raise ValueError(
                f"track_valid: got shape {tuple(valid.shape)}, wanted ({count},) and a track"
            )


class PromptedSAM(nn.Module):
    """SAM whose prompts come from expressions.

    A subclass implements `encode_text`, `prompt` and, if it has a memory, `next_track`. All users of a
    model (sessions, command line, evaluation, page) use only this interface.
    """

    config: RefSAMConfig | EVFConfig
    image_encoder: ImageEncoder
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder
    pixel_mean: Tensor
    pixel_std: Tensor

    @classmethod
    def expected_tensors(cls, config: Any) -> dict[str, Tensor]:
        """Names and shapes of the state dict of a model with this configuration, as tensors without storage."""
        make: Any = cls
        with torch.device("meta"):
            return make(config).state_dict()

    @abstractmethod
    def encode_text(self, expressions: Sequence[str]) -> TextPrompt:
        """P expressions to prompts; raises ExpressionError for one that cannot be understood."""

    @abstractmethod
    def prompt(self, inputs: DecodeInputs) -> Prompts:
        """The prompts of P expressions for the mask decoder."""

    def next_track(self, object_token: Tensor, track: Tensor | None) -> Tensor:
        """The track token (P, C) for the next frame; a model without a memory passes the object token on."""
        return object_token

    def text_source(self) -> Source | None:
        """The pretrained text encoder that the model needs; None if it contains its own."""
        return None

    def forget_text(self) -> None:
        """Clear the cache of encoded expressions."""

    def packed_parts(self) -> list[PackedModule]:
        """Parts besides the image encoder that `optimize` packs; for torch.int8 they take their automatic dtype."""
        return []

    def refine(
        self, logits: Tensor, object_token: Tensor, inputs: DecodeInputs, match: Tensor | None
    ) -> Tensor:
        """Refine mask logits (P, 4h, 4w), by default not at all; object_token (P, C), match as `prompt` returned it."""
        return logits

    def view(self, frames: Tensor) -> Tensor | None:
        """The model's second input from frames (B, H, W, 3) uint8 RGB, for its prompts; None if it has none."""
        return None

    @property
    def image_size(self) -> int:
        """The side S, in pixels, of the square that frames are resized into."""
        return self.config.image_encoder.image_size

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.pixel_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return self.pixel_mean.dtype

    def _set_pixel_statistics(self) -> None:
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def optimize(
        self,
        dtype: torch.dtype | None = None,
        *,
        release_weights: bool = False,
        fixed_weights: bool = False,
    ) -> Self:
        """Use packed weights whenever autograd is off; returns the model.

        dtype of the image encoder's matrix products: None for the fastest that is exact enough; torch.int8 is
        faster and coarser, on CPUs, and release_weights then frees the replaced matrices: see
        `ImageEncoder.optimize`. fixed_weights: no weight will change, so that no time is spent on looking for
        changes at each frame. A second call changes nothing; `train()` and `deoptimize()` undo it.
        Raises ValueError in training mode.
        """
        if self.training:
            raise ValueError("optimize: got a model in training mode, wanted eval() before it")
        self.image_encoder.optimize(
            dtype, release_weights=release_weights, fixed_weights=fixed_weights
        )
        for part in self.packed_parts():
            part.optimize(None if dtype == torch.int8 else dtype, fixed_weights=fixed_weights)
        return self

    def deoptimize(self) -> Self:
        """Undo `optimize`: results equal those before it, bit by bit; returns the model."""
        self.image_encoder.deoptimize()
        for part in self.packed_parts():
            part.deoptimize()
        return self

    @property
    def is_optimized(self) -> bool:
        """Whether `optimize` was called and not undone."""
        return self.image_encoder.packing is not None

    @property
    def fixed_packing(self) -> Packing | None:
        """The image encoder's packing if `optimize` was told that no weight will change; else, and after `train()`, None."""
        packing = self.image_encoder.packing
        return packing if packing is not None and packing.fixed_weights else None

    def preprocess(self, frames: Tensor, image_size: int | None = None) -> tuple[Tensor, FrameSize]:
        """Frames (B, H, W, 3) uint8 RGB to normalised pixels (B, 3, S, S) and their sizes.

        Without padding to the square the pixels are whole patches, (B, 3, h, w) with h, w <= S. image_size
        takes another S than the model's own, a multiple of the patch size. See
        `refsam.model.preprocessing.preprocess`. Raises ValueError for other shapes or dtypes.
        """
        size, sizes = image_size or self.image_size, self.config.image_encoder
        patch_size = sizes.patch_size if sizes.padding == "none" else None
        return preprocess(frames.to(self.device), size, self.pixel_mean, self.pixel_std, patch_size)

    @abstractmethod
    def encode_image(self, pixels: Tensor, view: Tensor | None = None) -> ImageFeatures:
        """Normalised pixels (B, 3, S, S) and the frames' `view` to features that any number of expressions share."""

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
        if image_index is None:
            if len(image.embedding) != 1:
                raise ValueError(f"image_index: got None for {len(image.embedding)} frames")
            image_index = torch.zeros_like(text.lengths)
        inputs = DecodeInputs(image, text, image_index, track, track_valid)
        inputs.check(self.config.prompt_dim)
        prompts = self.prompt(inputs)
        logits, iou, mask_tokens = self.mask_decoder(
            prompts.image,
            self.prompt_encoder.pe_layer(*image.grid, prompts.image.dtype),
            prompts.sparse,
            prompts.lengths,
            image.grid,
        )
        object_token = mask_tokens[:, 0]
        refined = self.refine(logits[:, 0], object_token, inputs, prompts.match)
        track_token = self.next_track(object_token, prompts.track)
        return MaskOutput(_on_square(refined), iou[:, 0], object_token, track_token)


def _on_square(logits: Tensor) -> Tensor:
    """Logits (P, h, w) of the upper left part of a square to those of the whole, whose rest repeats the border."""
    height, width = logits.shape[1:]
    if height == width:
        return logits
    side = max(height, width)
    return F.pad(logits, (0, side - width, 0, side - height), mode="replicate")


def add_image(dense: Tensor, embedding: Tensor, image_index: Tensor) -> Tensor:
    """Dense prompts (P, N, C), which may be overwritten, plus the embedding (B, N, C) of each expression's image."""
    if len(embedding) != 1:
        embedding = embedding[image_index]
    if dense.dtype == embedding.dtype:
        return dense.add_(embedding)
    return dense + embedding
