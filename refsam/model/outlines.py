"""Sharpens the mask decoder's logits with a trunk's fine features."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.mask_decoder import HeadMLP


class OutlineHead(nn.Module):
    """An MLP at every location of a mask; the object token sets its hidden layer's scale and shift, and its output weights.

    Inputs: the fine features, the decoder's logit, and how well the location matches the noun. The correction
    starts at zero.
    """

    def __init__(self, dim: int, fine_channels: int) -> None:
        super().__init__()
        self.condition = HeadMLP(dim, dim, 3 * fine_channels + 1, num_layers=2)
        self.logit = nn.Parameter(torch.full((fine_channels,), 0.05))
        self.match = nn.Parameter(torch.full((fine_channels,), 0.05))
        nn.init.zeros_(self.condition.last.weight)
        nn.init.zeros_(self.condition.last.bias)

    def forward(
        self,
        logits: Tensor,
        match: Tensor,
        object_token: Tensor,
        fine: Tensor,
        image_index: Tensor,
    ) -> Tensor:
        """Logits (P, h, w) to logits (P, h, w).

        match (P, h / 4, w / 4) of the noun, object tokens (P, C), fine features (B, F, h, w), each mask's image (P,).
        """
        condition = self.condition(object_token)
        gain, condition = condition[:, -1, None, None], condition[:, None, None, :-1]
        scale, shift, read = condition.chunk(3, -1)
        match = F.interpolate(match[:, None], logits.shape[1:], mode="bilinear")[:, 0]
        if len(fine) != 1:
            fine = fine[image_index]
        seen = logits[..., None] * self.logit + match[..., None] * self.match
        hidden = F.gelu(fine.permute(0, 2, 3, 1) * (1 + scale) + shift + seen)
        return logits + gain * match + (hidden * read).sum(-1)
