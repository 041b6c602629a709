"""The implicit tracking module: one vector per object, carried from frame to frame."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SingleTokenAttention(nn.Module):
    """Multi-head self-attention of a sequence of length one, parameters as in nn.MultiheadAttention.

    One token attends to itself with weight 1, so only the value and output projections act; the
    others are kept because the authors' checkpoints have them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(P, C) to (P, C)."""
        value_weight = self.in_proj_weight.chunk(3)[2]
        value_bias = self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(x, value_weight, value_bias))


class TrackingModule(nn.Module):
    """Turns a frame's object token into the next frame's track token (paper, section 3.5)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.self_attn = SingleTokenAttention(dim)
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.linear_feat1 = nn.Linear(dim, hidden_dim)
        self.linear_feat2 = nn.Linear(hidden_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm_feat = nn.LayerNorm(dim)

    def forward(self, object_token: Tensor, track_token: Tensor | None = None) -> Tensor:
        """Object token and, after the first frame, the previous track token, (P, C) each, to the next track token (P, C)."""
        x = object_token if track_token is None else object_token + track_token
        attended = self.norm1(x + self.self_attn(x))
        hidden = self.norm2(attended + self.linear2(F.relu(self.linear1(attended))))
        return self.norm_feat(x + self.linear_feat2(F.relu(self.linear_feat1(hidden))))
