"""YOLOX-Nano: boxes with scores for COCO's 80 classes (arXiv 2107.08430)."""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.trunk import TRUNK_CLASSES, Conv

# The classes of the published scores, in their order, by the nouns of `refsam.data.photographs`.
DETECTOR_CLASSES = tuple(
    "person;bicycle;car;motorcycle;airplane;bus;train;truck;boat;traffic light;fire hydrant;stop sign;parking meter;bench;"
    "bird;cat;dog;horse;sheep;cow;elephant;bear;zebra;giraffe;backpack;umbrella;handbag;tie;suitcase;frisbee;skis;snowboard;"
    "sports ball;kite;baseball bat;baseball glove;skateboard;surfboard;tennis racket;bottle;wine glass;cup;fork;knife;spoon;bowl;"
    "banana;apple;sandwich;orange;broccoli;carrot;hot dog;pizza;donut;cake;chair;sofa;potted plant;bed;table;toilet;tv;"
    "laptop;mouse;remote;keyboard;phone;microwave;oven;toaster;sink;refrigerator;book;clock;vase;scissors;teddy bear;"
    "hair drier;toothbrush".split(";")
)
_STRIDES = (8, 16, 32)
_HEAD_CHANNELS = 64
_GREY = 114.0  # the published network's padding
_KEPT = 64  # boxes of a frame, those of the highest scores
_AT_A_TIME = 16  # boxes mapped at a time, so that intermediate values stay in the cache
# A box's score as a value to compare with nouns: 0 at a score of 0.2. Classes that the trunk was not trained on weigh more.
_SCORE_ZERO = 0.2
_SCORE_SCALE, _SCORE_SCALE_OF_TRUNK = 12.0, 4.0
# Values of the best box around a location: score, middle, sides, and where in the box the location lies.
BOX_CHANNELS = 7


class Boxes(NamedTuple):
    """A candidates of B frames: corners (B, A, 4), x0, y0, x1, y1 in pixels, and scores (B, A, 80) in 0..1."""

    corners: Tensor
    scores: Tensor


def _conv(channels_in: int, channels_out: int) -> Conv:
    return Conv(channels_in, channels_out, activation="silu")


def _separable(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 on each channel by itself, then 1x1."""
    depthwise = Conv(channels_in, channels_in, 3, stride, groups=channels_in, activation="silu")
    return nn.Sequential(depthwise, _conv(channels_in, channels_out))


class Bottleneck(nn.Module):
    """1x1, then 3x3 and 1x1; the input is added if `adds`."""

    def __init__(self, channels: int, adds: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(_conv(channels, channels), _separable(channels, channels))
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        y = self.layers(x)
        return x + y if self.adds else y


class SplitStage(nn.Module):
    """Half of the channels go through bottlenecks, the other half past them (CSP, arXiv 1911.11929)."""

    def __init__(self, channels_in: int, channels_out: int, depth: int = 1, adds: bool = False):
        super().__init__()
        half = channels_out // 2
        self.through, self.past = _conv(channels_in, half), _conv(channels_in, half)
        self.bottlenecks = nn.Sequential(*(Bottleneck(half, adds) for _ in range(depth)))
        self.join = _conv(channels_out, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h, w)."""
        return self.join(torch.cat([self.bottlenecks(self.through(x)), self.past(x)], 1))


class PoolingPyramid(nn.Module):
    """The map itself and its maxima over three neighbourhoods (spatial pyramid pooling)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = _conv(channels, channels // 2)
        self.join = _conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        x = self.reduce(x)
        # Maxima of maxima: 5x5 twice is 9x9, thrice 13x13.
        maps = [x]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, 1, 2))
        return self.join(torch.cat(maps, 1))


class Pyramid(nn.Module):
    """Mixes maps at strides 8, 16 and 32: from coarse to fine, then back (a path aggregation network)."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = _conv(256, 128)
        self.down_16 = SplitStage(256, 128)
        self.reduce = _conv(128, 64)
        self.down_8 = SplitStage(128, 64)
        self.shrink_8 = _separable(64, 64, stride=2)
        self.up_16 = SplitStage(128, 128)
        self.shrink_16 = _separable(128, 128, stride=2)
        self.up_32 = SplitStage(256, 256)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> list[Tensor]:
        """(B, 64, h, w), (B, 128, h / 2, w / 2) and (B, 256, h / 4, w / 4) to the same shapes."""
        coarse = self.lateral(coarse)
        middle = self.reduce(self.down_16(torch.cat([_doubled(coarse), middle], 1)))
        fine = self.down_8(torch.cat([_doubled(middle), fine], 1))
        middle = self.up_16(torch.cat([self.shrink_8(fine), middle], 1))
        return [fine, middle, self.up_32(torch.cat([self.shrink_16(middle), coarse], 1))]


class BoxHead(nn.Module):
    """Class scores, a box and an objectness score at each location of one map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _HEAD_CHANNELS
        self.stem = _conv(channels, width)
        self.class_layers = nn.Sequential(_separable(width, width), _separable(width, width))
        self.classes = Conv(width, len(DETECTOR_CLASSES))
        self.box_layers = nn.Sequential(_separable(width, width), _separable(width, width))
        self.box = Conv(width, 4)
        self.object = Conv(width, 1)

    def forward(self, x: Tensor, stride: int) -> Boxes:
        """(B, C, h, w) to h * w candidates."""
        x = self.stem(x)
        of_box = self.box_layers(x)
        scores = self.classes(self.class_layers(x)).float().sigmoid()
        scores = scores * self.object(of_box).float().sigmoid()
        box = self.box(of_box).float()
        height, width = box.shape[2:]
        rows = torch.arange(height, device=box.device, dtype=box.dtype)[:, None].expand(-1, width)
        columns = torch.arange(width, device=box.device, dtype=box.dtype).expand(height, -1)
        middle = (box[:, :2] + torch.stack([columns, rows])) * stride
        half = box[:, 2:].exp() * (stride / 2)
        corners = torch.cat([middle - half, middle + half], 1)
        return Boxes(corners.flatten(2).mT, scores.flatten(2).mT)


class Detector(nn.Module):
    """YOLOX-Nano with batch norms folded in; parameters have the order of the published graph.

    Its published weights are not trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(12, 16, 3, activation="silu")
        self.stride_4 = nn.Sequential(_separable(16, 32, 2), SplitStage(32, 32, 1, True))
        self.stride_8 = nn.Sequential(_separable(32, 64, 2), SplitStage(64, 64, 3, True))
        self.stride_16 = nn.Sequential(_separable(64, 128, 2), SplitStage(128, 128, 3, True))
        self.stride_32 = nn.Sequential(
            _separable(128, 256, 2), PoolingPyramid(256), SplitStage(256, 256)
        )
        self.pyramid = Pyramid()
        self.heads = nn.ModuleList(BoxHead(channels) for channels in (64, 128, 256))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Boxes:
        """RGB pixels (B, 3, H, W), 0..255, to boxes; sides that are no multiples of 32 are padded with grey."""
        height, width = pixels.shape[2:]
        pixels = F.pad(pixels, (0, -width % 32, 0, -height % 32), value=_GREY)
        fine = self.stride_8(self.stride_4(self.stem(_gathered(pixels))))
        middle = self.stride_16(fine)
        maps = self.pyramid(fine, middle, self.stride_32(middle))
        found = [head(x, s) for head, x, s in zip(self.heads, maps, _STRIDES, strict=True)]
        return Boxes(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


class BoxMaps(NamedTuple):
    """Boxes as maps of N locations: names (B, N, 80), a value per class; best (B, N, 7), the box with the best score there."""

    names: Tensor
    best: Tensor


def box_maps(found: Boxes, height: int, width: int, stride: int) -> BoxMaps:
    """Map the boxes of a frame of height x width pixels onto its locations, one every `stride` pixels."""
    corners, scores = found
    kept = scores.amax(2).topk(min(_KEPT, scores.shape[1]), 1).indices[..., None]
    scores = scores.take_along_dim(kept, 1)
    corners = corners.take_along_dim(kept, 1)
    y = (torch.arange(height // stride, device=scores.device) + 0.5) * stride
    x = (torch.arange(width // stride, device=scores.device) + 0.5) * stride
    x0, y0, x1, y1 = corners[..., None].unbind(2)  # (B, K, 1) each
    inside_x = torch.minimum(x - x0, x1 - x)[:, :, None]
    inside_y = torch.minimum(y - y0, y1 - y)[:, :, :, None]
    # 0.5 at a box's edge, 1 from half a stride inside it on.
    inside = (0.5 + torch.minimum(inside_x, inside_y) / stride).clamp(0, 1).flatten(2)  # (B, K, N)
    few = zip(inside.split(_AT_A_TIME, 1), scores.split(_AT_A_TIME, 1), strict=True)
    names = reduce(torch.maximum, ((i[..., None] * s[:, :, None]).amax(1) for i, s in few))
    certainty = inside * scores.amax(2)[:, :, None]
    score, which = certainty.max(1)  # (B, N)
    around = corners.take_along_dim(which[..., None], 1)
    locations = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1).flatten(0, 1)
    frame = corners.new_tensor([width, height])
    middle, sides = (around[..., :2] + around[..., 2:]) / 2, around[..., 2:] - around[..., :2]
    offset = (locations - middle) / sides.clamp(min=1)
    parts = [middle / frame - 0.5, sides / frame, offset.clamp(-1, 1)]
    best = torch.cat([score[..., None], *(part * score[..., None] for part in parts)], -1)
    scales = [
        _SCORE_SCALE_OF_TRUNK if name in TRUNK_CLASSES else _SCORE_SCALE
        for name in DETECTOR_CLASSES
    ]
    return BoxMaps(names.new_tensor(scales) * (names - _SCORE_ZERO), best)


def _gathered(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 12, H / 2, W / 2): the four pixels of a square side by side, column by column."""
    parts = [pixels[..., y::2, x::2] for x in (0, 1) for y in (0, 1)]
    return torch.cat(parts, 1)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
