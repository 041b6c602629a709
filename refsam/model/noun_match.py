"""Scores of how well each place of an image matches an expression's noun."""

import torch
from torch import Tensor, nn

from refsam.model.features import TextPrompt


class NounMatch(nn.Module):
    """Compares words with what the trunk saw at each place, as a classifier would; the decoder is told the result.

    Each word names something, and has a share in what the expression names: "the dog on the left" names a dog.
    """

    def __init__(self, dim: int, name_channels: int) -> None:
        super().__init__()
        self.share = nn.Linear(dim, 1)
        self.name = nn.Linear(dim, name_channels)
        self.prompt = nn.Parameter(0.1 * torch.randn(dim))

    def forward(self, text: TextPrompt, names: Tensor, image_index: Tensor) -> Tensor:
        """Scores (P, N) of each place of images `names` (B, N, K) for P expressions, positive where it shows them."""
        is_padding = torch.arange(text.words.shape[1], device=names.device) >= text.lengths[:, None]
        words = text.words.masked_fill(is_padding[..., None], 0)
        shares = self.share(words)[..., 0].masked_fill(is_padding, -torch.inf).softmax(-1)
        wanted = (shares[:, None] @ self.name(words))[:, 0]
        if len(names) == 1:
            return wanted @ names[0].T
        return (names[image_index] @ wanted[..., None])[..., 0]
