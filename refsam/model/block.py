"""One block of SAM's ViT with adapters: its parameters, and the computation for any weights."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.adapter import Adapter
from refsam_kernels import (
    AdapterWeights,
    MLPWeights,
    adapter_mlp,
    adapter_projection,
    rel_pos_attention,
    resize_table,
)

VIT_EPS = 1e-6
ADAPTER_SCALE = 0.5


class BlockWeights(NamedTuple):
    """One block's tensors as the operators of refsam_kernels take them.

    window_size 0 attends globally. crops: distances in a rectangle are those of its square, not SAM's tables
    interpolated to each side.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    rel_pos_h: Tensor
    rel_pos_w: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    space_adapter: AdapterWeights | None
    norm_weight: Tensor
    norm_bias: Tensor
    mlp: MLPWeights
    mlp_adapter: AdapterWeights | None
    num_heads: int
    window_size: int
    crops: bool = False

    def without_matrices(self) -> "BlockWeights":
        """The same without the large tensors, for a block that has packed copies of them."""
        empty = self.qkv_weight.new_empty(0)
        return self._replace(
            qkv_weight=empty,
            proj_weight=empty,
            space_adapter=None,
            mlp=MLPWeights(empty, empty, empty, empty),
        )


class RelPosAttention(nn.Module):
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
        crops: bool = False,
    ) -> None:
        super().__init__()
        self.crops = crops
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(dim, eps=VIT_EPS)
        self.attn = RelPosAttention(dim, num_heads, window_size or grid_size)
        self.norm2 = nn.LayerNorm(dim, eps=VIT_EPS)
        self.mlp = MLP(dim, mlp_dim)
        self.Space_Adapter = Adapter(dim, adapter_dim) if adapter_dim else None
        self.MLP_Adapter = Adapter(dim, adapter_dim) if adapter_dim else None

    def weights(self) -> BlockWeights:
        """The parameters as they are."""
        attn, mlp = self.attn, self.mlp
        return BlockWeights(
            attn.qkv.weight,
            attn.qkv.bias,
            attn.rel_pos_h,
            attn.rel_pos_w,
            attn.proj.weight,
            attn.proj.bias,
            self.Space_Adapter.weights if self.Space_Adapter is not None else None,
            self.norm2.weight,
            self.norm2.bias,
            MLPWeights(mlp.lin1.weight, mlp.lin1.bias, mlp.lin2.weight, mlp.lin2.bias),
            self.MLP_Adapter.weights if self.MLP_Adapter is not None else None,
            attn.num_heads,
            self.window_size,
            self.crops,
        )

    def forward(
        self, x: Tensor, normed: Tensor, next_norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `run_block`, with the block's own parameters."""
        return run_block(self.weights(), x, normed, next_norm)


def run_block(
    weights: BlockWeights, x: Tensor, normed: Tensor, next_norm: nn.LayerNorm | None
) -> tuple[Tensor, Tensor | None]:
    """Tokens and their norm1, both (B, h, w, D), to the next block's pair (paper, figure 3).

    The norm that follows is folded into the MLP's operator, so each block is handed the norm of the
    next one; after the last there is none.
    """
    attention = attend(weights, F.linear(normed, weights.qkv_weight, weights.qkv_bias))
    x, normed = adapter_projection(
        attention,
        x,
        weights.proj_weight,
        weights.proj_bias,
        weights.space_adapter,
        weights.norm_weight,
        weights.norm_bias,
        eps=VIT_EPS,
    )
    return adapter_mlp(
        normed,
        x,
        *weights.mlp,
        weights.mlp_adapter,
        next_norm.weight if next_norm is not None else None,
        next_norm.bias if next_norm is not None else None,
        scale=ADAPTER_SCALE,
        eps=VIT_EPS,
    )


def attend(weights: BlockWeights, qkv: Tensor, *, int8_scores: bool = False) -> Tensor:
    """The block's attention on its qkv product (B, h, w, 3*D); for int8_scores see `rel_pos_attention`."""
    height, width = qkv.shape[1:3]
    rel_pos_h, rel_pos_w = weights.rel_pos_h, weights.rel_pos_w
    if weights.crops and height != width and not weights.window_size:
        square = max(height, width)
        rel_pos_h = _distances_below(height, resize_table(rel_pos_h, square))
        rel_pos_w = _distances_below(width, resize_table(rel_pos_w, square))
    return rel_pos_attention(
        qkv,
        rel_pos_h,
        rel_pos_w,
        num_heads=weights.num_heads,
        window_size=weights.window_size,
        qkv_bias=weights.qkv_bias,
        int8_scores=int8_scores,
    )


def _distances_below(size: int, table: Tensor) -> Tensor:
    """The rows (2*size-1, head_dim) of a longer table that a side of `size` tokens needs."""
    first = table.shape[0] // 2 - size + 1
    return table[first : first + 2 * size - 1]
