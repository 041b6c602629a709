"""MobileNetV2 with DeepLabv3's small head: what a network that was trained on photographs sees in a frame."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refsam_kernels import can_prepack

# Output channels at width 1, stride and dilation of each inverted residual; all but the first expand sixfold.
_RESIDUALS = (
    (16, 1, 1),
    *((24, 2, 1), (24, 1, 1)),
    *((32, 2, 1), (32, 1, 1), (32, 1, 1)),
    *((64, 2, 1), (64, 1, 1), (64, 1, 1), (64, 1, 1)),
    *((96, 1, 1), (96, 1, 1), (96, 1, 1)),
    *((160, 1, 1), (160, 1, 2), (160, 1, 2)),
    (320, 1, 2),
)
# Behind which of `Trunk.features` the maps of `TrunkMaps` are taken.
_STRIDE_4, _STRIDE_8, _STRIDE_16 = 3, 6, 13
_CONTEXT_CHANNELS = 256
STRIDE = 16


class TrunkMaps(NamedTuple):
    """A trunk's feature maps of B frames, channels first: (B, channels, height / stride, width / stride).

    stride_4, stride_8 and stride_16 are taken on the way; last (stride 16) is what the final layer gives, context
    (stride 16) what the head makes of it and of its mean over the frame.
    """

    stride_4: Tensor
    stride_8: Tensor
    stride_16: Tensor
    last: Tensor
    context: Tensor


class TrunkChannels(NamedTuple):
    """Number of channels of each of `TrunkMaps`."""

    stride_4: int
    stride_8: int
    stride_16: int
    last: int
    context: int


class Conv(nn.Conv2d):
    """A convolution with bias that keeps the grid, and ReLU6, ReLU or nothing behind it: `ceiling` 6, infinity or None."""

    is_packed = False

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        ceiling: float | None = None,
    ) -> None:
        super().__init__(
            channels_in, channels_out, size, stride, dilation * (size // 2), dilation, groups
        )
        self.ceiling = ceiling

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h / stride, w / stride)."""
        if self.is_packed:
            return self._convolve_at_once(x)
        x = super().forward(x)
        return x if self.ceiling is None else x.clamp(0, self.ceiling)

    def _convolve_at_once(self, x: Tensor) -> Tensor:
        """The same with the limits inside oneDNN's convolution, by the operator that torch.compile calls."""
        limits: dict[float | None, tuple[str, list[float | None]]] = {
            None: ("none", []),
            math.inf: ("relu", []),
        }
        activation, values = limits.get(self.ceiling, ("hardtanh", [0.0, self.ceiling]))
        sizes = (self.padding, self.stride, self.dilation, self.groups)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *sizes, activation, values, ""
        )


class FirstLayer(nn.Module):
    """The convolution of the pixels, named as in the published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(3, channels, 3, stride=2, ceiling=6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H / 2, W / 2)."""
        return self.conv(x)


class InvertedResidual(nn.Module):
    """Expand by 1x1, 3x3 on each channel by itself, project by 1x1; the input is added where shapes agree."""

    def __init__(
        self, channels_in: int, channels_out: int, expansion: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expand = Conv(channels_in, inner, ceiling=6) if expansion > 1 else nn.Identity()
        self.depthwise = Conv(inner, inner, 3, stride, dilation, groups=inner, ceiling=6)
        self.project = Conv(inner, channels_out)
        self.is_residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h / stride, w / stride)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


class ContextHead(nn.Module):
    """DeepLabv3's head without dilated branches: each place beside the mean of the frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = Conv(channels, _CONTEXT_CHANNELS, ceiling=math.inf)
        self.conv = Conv(channels, _CONTEXT_CHANNELS, ceiling=math.inf)
        self.project = Conv(2 * _CONTEXT_CHANNELS, _CONTEXT_CHANNELS, ceiling=math.inf)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 256, h, w)."""
        here = self.conv(x)
        everywhere = self.pool(x.mean((2, 3), keepdim=True)).expand_as(here)
        return self.project(torch.cat([everywhere, here], 1))


class Trunk(nn.Module):
    """MobileNetV2 (arXiv 1801.04381) with batch norms folded in and DeepLabv3's head (arXiv 1706.05587) up to its class scores.

    Parameters are named as in `mobilenet_v2_deeplab_voc`, Google Coral's test data; `width` multiplies the channels.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = int(32 * width)
        layers: list[nn.Module] = [FirstLayer(channels)]
        for number, (channels_out, stride, dilation) in enumerate(_RESIDUALS):
            next_channels = int(channels_out * width)
            expansion = 6 if number else 1
            layers.append(InvertedResidual(channels, next_channels, expansion, stride, dilation))
            channels = next_channels
        self.features = nn.Sequential(*layers)
        self.aspp = ContextHead(channels)

    def forward(self, pixels: Tensor) -> TrunkMaps:
        """Pixels (B, 3, H, W), (value - 128) / 128 of 0..255, to maps; H and W are multiples of 16."""
        x, taken = pixels, {}
        for number, layer in enumerate(self.features):
            taken[number] = x = layer(x)
        return TrunkMaps(taken[_STRIDE_4], taken[_STRIDE_8], taken[_STRIDE_16], x, self.aspp(x))


def channels(width: float) -> TrunkChannels:
    """Number of channels of each map."""
    layers = (_STRIDE_4, _STRIDE_8, _STRIDE_16, len(_RESIDUALS))
    counts = (int(_RESIDUALS[behind - 1][0] * width) for behind in layers)
    return TrunkChannels(*[*counts, _CONTEXT_CHANNELS])


def pack_convolutions(trunk: Trunk) -> None:
    """From now on compute each convolution and its limits as one, for inference; where torch cannot, nothing changes."""
    weight = trunk.aspp.conv.weight
    can = can_prepack(weight) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    for module in trunk.modules():
        if isinstance(module, Conv):
            module.is_packed = can
