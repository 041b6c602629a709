"""LayerNorm over the channels of maps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_2D_EPS = 1e-6


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (B, C, h, w) (segment-anything, modeling/common.py)."""

    eps = NORM_2D_EPS

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) float to the same shape; SAM's order of operations, hence its bits."""
        centred = x - x.mean(1, keepdim=True)
        variance = centred.pow(2).mean(1, keepdim=True)
        normed = centred / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * normed + self.bias[:, None, None]

    def on_last(self, x: Tensor) -> Tensor:
        """The same over the last dimension of (..., C), by torch's fused function; bits differ."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
