"""The cross-modal MLP: from the text encoder's space into SAM's prompt space."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class CrossModalMLP(nn.Module):
    """Linear layers with ReLU (paper, section 3.3), one set for words and sentence.

    num_hidden is the paper's k: the number of square layers between the first and the last.
    """

    def __init__(self, text_dim: int, prompt_dim: int, num_hidden: int) -> None:
        super().__init__()
        hidden_dim = text_dim // 2
        widths = [text_dim, *[hidden_dim] * (num_hidden + 1)]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_dim, prompt_dim))

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder tokens (P, T, Ct), the first lengths (P,) of each row valid, to prompts.

        Returns words (P, T, C) and sentence (P, C), unit vectors; the sentence comes from the mean of
        the valid tokens. Padding is ignored, NaN included.
        """
        positions = lengths.new_ones(tokens.shape[1]).cumsum(0) - 1
        is_padding = positions >= lengths[:, None]
        tokens = tokens.masked_fill(is_padding[..., None], 0.0)
        mean = tokens.sum(1) / lengths[:, None].to(tokens.dtype)
        words, sentence = self.layers(tokens), self.layers(mean)
        return F.normalize(words, dim=-1), F.normalize(sentence, dim=-1)
