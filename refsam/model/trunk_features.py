"""Turns a trunk's maps into image tokens, one more level of dense attention, and fine features for outlines."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.detector import BOX_CHANNELS, DETECTOR_CLASSES, Detector, box_maps
from refsam.model.packing import PackedModule
from refsam.model.trunk import STRIDE, Trunk, TrunkMaps, channels, pack_convolutions

FINE_CHANNELS = 32
NAME_CHANNELS = 128
GREY = 128.0  # pixels are seen as (value - 128) / 128


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w); fast for channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TrunkOutput(NamedTuple):
    """The features that RefSAM takes from a trunk in B frames.

    added (B, h, w, D) is added to the tokens, level (B, h, w, D) is one more level of dense attention. names
    (B, h * w, K): values of each location to compare with nouns. fine (B, F, 4h, 4w): features for outlines.
    """

    added: Tensor
    level: Tensor
    names: Tensor
    fine: Tensor


class TrunkFeatures(PackedModule):
    """Projections of a trunk's maps, each normalised first because its values are large.

    The addition to the tokens starts at zero, so an encoder that gets a trunk computes the same as before. With a
    detector, its boxes are added to the tokens too, and its class scores are appended to the names.
    """

    def __init__(self, width: float, embed_dim: int, detector: bool = False) -> None:
        super().__init__()
        counts = channels(width)
        self.network = Trunk(width)
        self.norms = nn.ModuleList(ChannelNorm(count) for count in counts)
        deep = counts.stride_16 + counts.last + counts.context
        self.tokens = nn.Linear(deep, embed_dim)
        self.level = nn.Linear(deep, embed_dim)
        self.names = nn.Linear(deep + counts.context, NAME_CHANNELS)
        self.fine = nn.ModuleList(
            nn.Conv2d(count, FINE_CHANNELS, 1) for count in (counts.stride_4, counts.stride_8, deep)
        )
        self.smooth = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(FINE_CHANNELS, FINE_CHANNELS, 3, padding=1),
            ChannelNorm(FINE_CHANNELS),
            nn.GELU(),
            nn.Conv2d(FINE_CHANNELS, FINE_CHANNELS, 3, padding=1),
            ChannelNorm(FINE_CHANNELS),
        )
        nn.init.zeros_(self.tokens.weight)
        nn.init.zeros_(self.tokens.bias)
        self.detector = Detector() if detector else None
        if detector:
            self.boxes = nn.Linear(BOX_CHANNELS, embed_dim, bias=False)
            nn.init.zeros_(self.boxes.weight)

    def forward(self, pixels: Tensor) -> TrunkOutput:
        """Pixels (B, 3, H, W), (value - 128) / 128 of 0..255, H and W multiples of 16."""
        packing = self.usable_packing
        if packing is None:
            return self._compute(pixels)
        dtype = packing.dtype_of(self.tokens.bias)  # as wide as the encoder's tokens
        (packed,) = packing.arranged([self], dtype)
        with torch.autocast(pixels.device.type, enabled=False):
            output = packed(pixels.to(dtype, memory_format=torch.channels_last))
        return TrunkOutput(*(map_.to(pixels.dtype) for map_ in output))

    @staticmethod
    def arrange(part: "TrunkFeatures", dtype: torch.dtype) -> Callable[[Tensor], TrunkOutput]:
        """A callable that computes the module in this dtype, channels last, which is faster for convolutions."""
        arranged = copy.deepcopy(part).deoptimize()
        # torch's types leave the memory format out.
        arranged.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        pack_convolutions(arranged)
        return arranged._compute

    def _compute(self, pixels: Tensor) -> TrunkOutput:
        maps = self.network(pixels)
        normed = TrunkMaps(*(norm(x) for norm, x in zip(self.norms, maps, strict=True)))
        deep = torch.cat([normed.stride_16, normed.last, normed.context], 1)
        tokens = deep.permute(0, 2, 3, 1)
        size = normed.stride_4.shape[-2:]
        fine = self.fine[0](normed.stride_4)
        for layer, coarse in zip(self.fine[1:], (normed.stride_8, deep), strict=True):
            fine = fine + F.interpolate(layer(coarse), size, mode="bilinear")
        # Not normalised: the published class scores are linear in the head's own values.
        context = maps.context.permute(0, 2, 3, 1)
        names = self.names(torch.cat([tokens, context], -1)).flatten(1, 2)
        added = self.tokens(tokens)
        if self.detector is not None:
            height, width = pixels.shape[2:]
            found = box_maps(self.detector(GREY * pixels + GREY), height, width, STRIDE)
            names = torch.cat([names, found.names.to(names.dtype)], -1)
            added = added + self.boxes(found.best.to(added.dtype)).view_as(added)
        return TrunkOutput(added, self.level(tokens), names, self.smooth(fine))


def name_channels(detector: bool) -> int:
    """Number of values per location to compare with nouns: the trunk's, then one for each class of a detector."""
    return NAME_CHANNELS + (len(DETECTOR_CLASSES) if detector else 0)
