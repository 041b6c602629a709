"""One operator in a project of one's own: a Swin-like layer whose attention has SAM's relative positions.

    python examples/one_kernel.py

Needs torch and refsam_kernels. The layer trains, serves any grid and makes no matrix of all pairs of tokens.
"""

import torch
from torch import Tensor, nn

from refsam_kernels import rel_pos_attention


class WindowAttention(nn.Module):
    """Self-attention within windows of a grid of tokens, with learned relative positions."""

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        table = torch.zeros(2 * window_size - 1, dim // num_heads)
        self.rel_pos_h = nn.Parameter(table)
        self.rel_pos_w = nn.Parameter(table.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, h, w, dim) to the same shape; windows that stick out of the grid attend to what there is."""
        attended = rel_pos_attention(
            self.qkv(tokens),
            self.rel_pos_h,
            self.rel_pos_w,
            num_heads=self.num_heads,
            window_size=self.window_size,
            pad_mode="mask",
        )
        return self.proj(attended)


def main() -> None:
    """Trains the layer to shift an image by one token, which it can only do by position."""
    torch.manual_seed(0)
    layer = WindowAttention(dim=32, num_heads=2, window_size=4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    first = last = 0.0
    for step in range(40):
        tokens = torch.randn(2, 6, 7, 32)
        loss = (layer(tokens) - tokens.roll(1, dims=2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
