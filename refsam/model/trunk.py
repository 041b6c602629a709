"""MobileNetV2 with DeepLabv3's small head: a network trained on photographs, beside SAM's ViT."""

from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from refsam.model.packed_conv import PackedConv, can_pack

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
# The layers of `Trunk.features` that give the first three of `TrunkMaps`.
_STRIDE_4, _STRIDE_8, _STRIDE_16 = 3, 6, 13
_CONTEXT_CHANNELS = 256
STRIDE = 16

# Classes of the published scores, as nouns of `refsam.data.photographs`; the first is the background.
TRUNK_CLASSES = tuple(
    "background;airplane;bicycle;bird;boat;bottle;bus;car;cat;chair;cow;table;dog;"
    "horse;motorcycle;person;potted plant;sheep;sofa;train;tv".split(";")
)

Activation = Literal["relu6", "relu", "silu"]
Value = TypeVar("Value")


class TrunkMaps(NamedTuple, Generic[Value]):
    """A value for each feature map of a trunk; a map of B frames is (B, channels, height / stride, width / stride).

    stride_4, stride_8 and stride_16 are taken on the way. last (stride 16) is the final layer's output; from it and its
    mean over the frame the head computes context (stride 16).
    """

    stride_4: Value
    stride_8: Value
    stride_16: Value
    last: Value
    context: Value


class Conv(nn.Conv2d):
    """A convolution with bias, padded to keep the grid, then relu6, relu, silu or nothing."""

    packed: PackedConv | None = None

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(
            channels_in, channels_out, size, stride, dilation * (size // 2), dilation, groups
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h / stride, w / stride)."""
        if self.packed is not None:
            return self.packed(x)
        x = self._convolve(x)
        return x if self.activation is None else getattr(F, self.activation)(x)

    def _convolve(self, x: Tensor) -> Tensor:
        """The convolution. With autograd a dilated depthwise one is split into undilated ones, whose backward is faster."""
        step = self.dilation[0]
        if step == 1 or self.groups == 1 or not torch.is_grad_enabled() or is_compiling():
            return super().forward(x)
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % step, 0, -height % step))
        # Locations that are `step` apart depend only on each other.
        apart = x.unflatten(3, (-1, step)).unflatten(2, (-1, step)).permute(3, 5, 0, 1, 2, 4)
        y = apart.flatten(0, 2).contiguous(memory_format=torch.channels_last)
        padding = self.kernel_size[0] // 2
        y = F.conv2d(y, self.weight, self.bias, self.stride, padding, 1, self.groups)
        y = y.view(apart.shape).permute(2, 3, 4, 0, 5, 1).flatten(4, 5).flatten(2, 3)
        return y[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


class FirstLayer(nn.Module):
    """The convolution of the pixels, named as in the published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(3, channels, 3, stride=2, activation="relu6")

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
        self.expand = (
            Conv(channels_in, inner, activation="relu6") if expansion > 1 else nn.Identity()
        )
        self.depthwise = Conv(inner, inner, 3, stride, dilation, groups=inner, activation="relu6")
        self.project = Conv(inner, channels_out)
        self.is_residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h / stride, w / stride)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


class ContextHead(nn.Module):
    """DeepLabv3's head without dilated branches: each location next to the mean over the frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = Conv(channels, _CONTEXT_CHANNELS, activation="relu")
        self.conv = Conv(channels, _CONTEXT_CHANNELS, activation="relu")
        self.project = Conv(2 * _CONTEXT_CHANNELS, _CONTEXT_CHANNELS, activation="relu")

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

    def forward(self, pixels: Tensor) -> TrunkMaps[Tensor]:
        """Pixels (B, 3, H, W), (value - 128) / 128 of 0..255, to maps; H and W are multiples of 16."""
        x, taken = pixels, {}
        for number, layer in enumerate(self.features):
            taken[number] = x = layer(x)
        return TrunkMaps(taken[_STRIDE_4], taken[_STRIDE_8], taken[_STRIDE_16], x, self.aspp(x))


def channels(width: float) -> TrunkMaps[int]:
    """Number of channels of each map."""
    layers = (_STRIDE_4, _STRIDE_8, _STRIDE_16, len(_RESIDUALS))
    counts = (int(_RESIDUALS[behind - 1][0] * width) for behind in layers)
    return TrunkMaps(*[*counts, _CONTEXT_CHANNELS])


def pack_convolutions(network: nn.Module) -> None:
    """Fuse each `Conv` with its activation, for inference; nothing changes where torch cannot."""
    for module in network.modules():
        if isinstance(module, Conv) and can_pack(module):
            module.packed = PackedConv(module, module.activation)
