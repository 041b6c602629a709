"""Hierarchical dense attention: matches every location of the image with the words."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.layer_norm import LayerNorm2d
from refsam_kernels import dense_attention


class HierarchicalDenseAttention(nn.Module):
    """Dense attention over several feature maps, mixed with learned convex weights (section 3.4).

    num_levels counts the final embedding and every intermediate map; with one level this is plain
    dense attention. initial_scale multiplies the similarities; None means 1/sqrt(dim), as in the
    paper. A fixed scale is a buffer, a learnable one is kept as its logarithm.
    """

    log_scale: Tensor

    def __init__(
        self,
        dim: int,
        encoder_dim: int,
        num_levels: int,
        learnable_scale: bool = True,
        initial_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * dim, dim, kernel_size=1)
        self.level_logits = nn.Parameter(torch.zeros(num_levels))
        self.projection = None
        if num_levels > 1:
            conv = nn.Conv2d(encoder_dim, dim, kernel_size=1, bias=False)
            self.projection = nn.Sequential(conv, LayerNorm2d(dim))
        log_scale = torch.tensor(math.log(initial_scale or dim**-0.5))
        if learnable_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def project(self, embedding: Tensor, intermediates: list[Tensor]) -> Tensor:
        """The feature maps that `forward` attends to: (L, B, N, C) unit vectors.

        embedding (B, N, C) is the normalised image embedding and becomes level 0; intermediates are
        the encoder's maps (B, h, w, D).
        """
        levels = [embedding]
        if self.projection is not None:
            layers: list[Any] = list(self.projection)
            conv, norm = layers
            weight = conv.weight.flatten(1)
            maps = torch.stack([F.linear(x.flatten(1, 2), weight) for x in intermediates])
            levels += F.normalize(norm.on_last(maps), dim=-1).to(embedding.dtype).unbind()
        return torch.stack(levels)

    def forward(self, levels: Tensor, text: Tensor, lengths: Tensor, image_index: Tensor) -> Tensor:
        """Dense prompts (P, N, C) of text (P, T, C), sentence first, lengths (P,) entries valid.

        levels (L, B, N, C) come from `project`; image_index (P,) int64 names each text's image.
        """
        weight, bias = self.conv.parameters()
        return dense_attention(
            levels,
            text,
            lengths,
            image_index,
            weight.flatten(1),
            bias,
            self.log_scale.exp(),
            self.level_logits.softmax(0),
        )
