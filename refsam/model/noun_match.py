"""Scores of how well each location of an image matches an expression's noun."""

import torch
from torch import Tensor, nn

from refsam.model.features import TextPrompt
from refsam.model.mask_decoder import HeadMLP


class NounMatch(nn.Module):
    """Compares words with the trunk's features at each location, like a classifier; the decoder gets the scores.

    Each word has a name vector and a weight: in "the dog on the left" the dog counts. The expression's name vector is the
    weighted mean. A name vector has `name_channels` free values and, for each of a detector's `classes`, the probability
    that the word means it.
    """

    def __init__(self, dim: int, name_channels: int, classes: int = 0) -> None:
        super().__init__()
        self.share = nn.Linear(dim, 1)
        self.name = nn.Linear(dim, name_channels)
        self.classes = HeadMLP(dim, 2 * dim, classes, num_layers=2) if classes else None
        if self.classes is not None:
            nn.init.constant_(self.classes.last.bias, -3.0)  # at first no word means any class
        self.prompt = nn.Parameter(0.1 * torch.randn(dim))

    def forward(self, text: TextPrompt, names: Tensor, image_index: Tensor) -> Tensor:
        """Scores (P, N) of each location of images `names` (B, N, K) for P expressions, positive where it matches."""
        is_padding = torch.arange(text.words.shape[1], device=names.device) >= text.lengths[:, None]
        words = text.words.masked_fill(is_padding[..., None], 0)
        shares = self.share(words)[..., 0].masked_fill(is_padding, -torch.inf).softmax(-1)
        named = self.name(words)
        if self.classes is not None:
            named = torch.cat([named, self.classes(words).sigmoid()], -1)
        wanted = (shares[:, None] @ named)[:, 0]
        if len(names) == 1:
            return wanted @ names[0].T
        return (names[image_index] @ wanted[..., None])[..., 0]
