"""SAM's two-way transformer: tokens and pixels attend to each other."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.block import MLP
from refsam_kernels import AttentionWeights, token_image_attention


class Attention(nn.Module):
    """Multi-head attention whose inner width is dim / downsample_rate, named as in SAM."""

    def __init__(self, dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        inner_dim = dim // downsample_rate
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner_dim)
        self.k_proj = nn.Linear(dim, inner_dim)
        self.v_proj = nn.Linear(dim, inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_padding: Tensor | None) -> Tensor:
        """Attention of few tokens, all (P, T, C); is_padding (P, T) bool marks keys to leave out."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if is_padding is not None:
            scores = scores.masked_fill(is_padding[:, None, None, :], -torch.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    @property
    def weights(self) -> AttentionWeights:
        """The eight tensors as `token_image_attention` takes them."""
        layers = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return AttentionWeights(*(t for layer in layers for t in (layer.weight, layer.bias)))


def cross_attention(
    attention: Attention,
    norm: nn.LayerNorm,
    queries: Tensor,
    keys: Tensor,
    query_pe: Tensor,
    key_pe: Tensor,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """`norm(queries + attention)` between tokens and pixels, shaped like queries (P, Tq, C)."""
    return token_image_attention(
        queries,
        keys,
        query_pe,
        key_pe,
        attention.weights,
        norm.weight,
        norm.bias,
        num_heads=attention.num_heads,
        key_lengths=key_lengths,
        eps=norm.eps,
    )


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens."""

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, downsample_rate: int, is_first: bool
    ) -> None:
        super().__init__()
        self.is_first = is_first
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, downsample_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, downsample_rate)
        self.norm4 = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Tensor,
        image: Tensor,
        token_pe: Tensor,
        image_pe: Tensor,
        lengths: Tensor | None,
        is_padding: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (P, T, C) and image (P, N, C) to the same shapes.

        lengths (P,) and is_padding (P, T) both say which tokens are padding; the first block has no
        residual around its self-attention, as in SAM.
        """
        if self.is_first:
            tokens = self.self_attn(tokens, tokens, tokens, is_padding)
        else:
            placed = tokens + token_pe
            tokens = tokens + self.self_attn(placed, placed, tokens, is_padding)
        tokens = self.norm1(tokens)
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        tokens = cross_attention(to_image, self.norm2, tokens, image, token_pe, image_pe)
        tokens = self.norm3(tokens + self.mlp.lin2(F.relu(self.mlp.lin1(tokens))))
        image = cross_attention(to_token, self.norm4, image, tokens, image_pe, token_pe, lengths)
        return tokens, image


class TwoWayTransformer(nn.Module):
    """The transformer of SAM's mask decoder (segment-anything, modeling/transformer.py)."""

    def __init__(
        self, depth: int, dim: int, num_heads: int, mlp_dim: int, downsample_rate: int = 2
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(dim, num_heads, mlp_dim, downsample_rate, is_first=index == 0)
            for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(dim, num_heads, downsample_rate)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Tensor,
        image: Tensor,
        image_pe: Tensor,
        lengths: Tensor | None = None,
        wanted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (P, T, C), image (P, N, C), its positions (1, N, C) to the first `wanted` tokens (None: all) and image.

        lengths (P,) int64: the first entries of each row of tokens are valid, no key attends to the
        others; None means all.
        """
        is_padding = None
        if lengths is not None:
            is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, lengths, is_padding)
        last, norm = self.final_attn_token_to_image, self.norm_final_attn
        # The last attention mixes no tokens with each other: those that nobody reads need not take part.
        tokens, token_pe = tokens[:, :wanted], token_pe[:, :wanted]
        return cross_attention(last, norm, tokens, image, token_pe, image_pe), image
