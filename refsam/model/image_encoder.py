"""SAM's ViT with adapters, channels-last from the patch embedding on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.adapter import Adapter
from refsam_kernels import adapter_mlp, adapter_projection, rel_pos_attention

VIT_EPS = NORM_2D_EPS = 1e-6


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (B, C, h, w) (segment-anything, modeling/common.py)."""

    def __init__(self, channels: int, eps: float = NORM_2D_EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) float to the same shape; SAM's order of operations, hence its bits."""
        centred = x - x.mean(1, keepdim=True)
        variance = centred.pow(2).mean(1, keepdim=True)
        normed = centred / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * normed + self.bias[:, None, None]


class PatchEmbedding(nn.Module):
    """One convolution that cuts an image into patches."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels to (B, h, w, D)."""
        return self.proj(pixels).permute(0, 2, 3, 1)


class AttentionWeights(nn.Module):
    """Parameters of one attention with decomposed relative positions, named as in SAM."""

    def __init__(self, dim: int, num_heads: int, size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads))


class MLP(nn.Module):
    """Parameters of a transformer's MLP, named as in SAM."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)


class Block(nn.Module):
    """One ViT block, with a space adapter and an MLP adapter where adapter_dim is not 0.

    window_size 0 attends globally; grid_size is the side of the token grid that the position
    tables of a global block are made for.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        window_size: int,
        grid_size: int,
        adapter_dim: int = 0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(dim, eps=VIT_EPS)
        self.attn = AttentionWeights(dim, num_heads, window_size or grid_size)
        self.norm2 = nn.LayerNorm(dim, eps=VIT_EPS)
        self.mlp = MLP(dim, mlp_dim)
        self.Space_Adapter = Adapter(dim, adapter_dim) if adapter_dim else None
        self.MLP_Adapter = Adapter(dim, adapter_dim) if adapter_dim else None

    def forward(
        self, x: Tensor, normed: Tensor, next_norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens and their norm1, both (B, h, w, D), to the next block's pair (paper, figure 3).

        The norm that follows is folded into the MLP's operator, so each block is handed the norm
        of the next one; after the last there is none.
        """
        attn, mlp = self.attn, self.mlp
        attention = rel_pos_attention(
            attn.qkv(normed),
            attn.rel_pos_h,
            attn.rel_pos_w,
            num_heads=attn.num_heads,
            window_size=self.window_size,
            qkv_bias=attn.qkv.bias,
        )
        x, normed = adapter_projection(
            attention,
            x,
            attn.proj.weight,
            attn.proj.bias,
            self.Space_Adapter.weights if self.Space_Adapter is not None else None,
            self.norm2.weight,
            self.norm2.bias,
            eps=VIT_EPS,
        )
        return adapter_mlp(
            normed,
            x,
            mlp.lin1.weight,
            mlp.lin1.bias,
            mlp.lin2.weight,
            mlp.lin2.bias,
            self.MLP_Adapter.weights if self.MLP_Adapter is not None else None,
            next_norm.weight if next_norm is not None else None,
            next_norm.bias if next_norm is not None else None,
            eps=VIT_EPS,
        )


class ImageEncoder(nn.Module):
    """SAM's image encoder (segment-anything, modeling/image_encoder.py) with adapters.

    Adapters stand in the second half of the blocks (paper, section 3.2). Parameter names are
    SAM's, the adapters' the authors'. Nothing is recorded for backward before the first
    parameter that is trained, so a frozen first half costs what it costs under `no_grad`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        window_size: int,
        global_blocks: tuple[int, ...],
        adapter_dim: int,
        output_dim: int,
    ) -> None:
        super().__init__()
        grid_size = image_size // patch_size
        self.patch_size = patch_size
        self.intermediate_blocks = tuple(global_blocks[:-1])
        self.patch_embed = PatchEmbedding(patch_size, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid_size, grid_size, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_dim,
                window_size=0 if index in global_blocks else window_size,
                grid_size=grid_size,
                adapter_dim=adapter_dim if index >= depth // 2 else 0,
            )
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, output_dim, kernel_size=1, bias=False),
            LayerNorm2d(output_dim),
            nn.Conv2d(output_dim, output_dim, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(output_dim),
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised pixels (B, 3, H, W) float to the neck's output and the intermediate features.

        Returns (B, h, w, C) and, for each global block but the last, its output (B, h, w, D).
        H and W must be multiples of the patch size; the position tables are interpolated where
        the grid is not the one they were made for. Raises ValueError for other shapes.
        """
        if (
            pixels.ndim != 4
            or pixels.shape[1] != 3
            or any(size % self.patch_size for size in pixels.shape[2:])
        ):
            raise ValueError(
                f"pixels: got shape {tuple(pixels.shape)}, wanted (B, 3, H, W) with H and W "
                f"multiples of {self.patch_size}"
            )
        x = self.patch_embed(pixels)
        x = x + self.position_table(x.shape[1], x.shape[2])
        norms: list[Any] = [*(block.norm1 for block in self.blocks), None]
        normed, intermediates = norms[0](x), []
        for index, (block, next_norm) in enumerate(zip(self.blocks, norms[1:], strict=True)):
            x, normed = block(x, normed, next_norm)
            if index in self.intermediate_blocks:
                intermediates.append(x)
        # Inside segment-anything the tokens lie channels-first in memory; a convolution's bits depend on it.
        features = self.neck(x.permute(0, 3, 1, 2).contiguous())
        return features.permute(0, 2, 3, 1), intermediates

    def position_table(self, height: int, width: int) -> Tensor:
        """The absolute positions (1, height, width, D), bicubic where the grid differs."""
        if self.pos_embed.shape[1:3] == (height, width):
            return self.pos_embed
        table = F.interpolate(
            self.pos_embed.permute(0, 3, 1, 2).float(), size=(height, width), mode="bicubic"
        )
        return table.permute(0, 2, 3, 1).to(self.pos_embed.dtype)
