"""`rel_pos_attention` in an inference server's own encoder class: DeepSeek-OCR's shapes, a padded batch, bfloat16.

    python examples/ocr_encoder.py
    python examples/ocr_encoder.py --pixels 320 --depth 2 --dim 128    # quicker

Needs torch alone. A server such as vLLM or SGLang changes five lines: the call between `qkv` and `proj`.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam_kernels import rel_pos_attention


class Attention(nn.Module):
    """SAM's attention on a grid of tokens (B, h, w, D); `window_size` 0 attends globally."""

    def __init__(self, dim: int, num_heads: int, window_size: int, grid: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        length = 2 * (window_size or grid) - 1
        self.rel_pos_h = nn.Parameter(torch.randn(length, dim // num_heads) / 8)
        self.rel_pos_w = nn.Parameter(torch.randn(length, dim // num_heads) / 8)

    def forward(self, tokens: Tensor) -> Tensor:
        """The five lines; no window is copied, no bias is made."""
        attended = rel_pos_attention(
            self.qkv(tokens),
            self.rel_pos_h,
            self.rel_pos_w,
            num_heads=self.num_heads,
            window_size=self.window_size,
            qkv_bias=self.qkv.bias,
        )
        return self.proj(attended)


class PlainAttention(Attention):
    """The same by torch alone: windows are copied and padded, and the bias has a value for every pair of tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """As a server computes it today."""
        images, height, width, dim = tokens.shape
        size = self.window_size or max(height, width)
        padded = F.pad(tokens, (0, 0, 0, -width % size, 0, -height % size))
        split = padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
        rows, columns = split.shape[1:3]
        qkv = self.qkv(split.reshape(-1, size * size, dim))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        distances = torch.arange(size)[:, None] - torch.arange(size) + size - 1
        grid = q.unflatten(2, (size, size))
        bias = torch.einsum("bnhwc,hkc->bnhwk", grid, self.rel_pos_h[distances])[..., None]
        bias = (
            bias + torch.einsum("bnhwc,wkc->bnhwk", grid, self.rel_pos_w[distances])[..., None, :]
        )
        attended = F.scaled_dot_product_attention(q, k, v, bias.flatten(4).flatten(2, 3))
        windows = attended.transpose(1, 2).reshape(images, rows, columns, size, size, dim)
        joined = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.proj(joined[:, :height, :width])


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, attention: Attention, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), attention, nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, h, w, D) to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Encoder(nn.Module):
    """Pages (B, 3, S, S) to (B, 1024, S / 64, S / 64): a ViT of windows, every third block global, a neck, two strides."""

    def __init__(self, kind: type[Attention], pixels: int, dim: int, depth: int) -> None:
        super().__init__()
        grid, heads = pixels // 16, dim // 64
        windows = [0 if i % 3 == 2 else 14 for i in range(depth)]
        self.patches = nn.Conv2d(3, dim, 16, 16)
        self.blocks = nn.Sequential(*(Block(kind(dim, heads, w, grid), dim) for w in windows))
        self.neck = nn.Sequential(
            nn.Conv2d(dim, 256, 1), nn.Conv2d(256, 512, 3, 2, 1), nn.Conv2d(512, 1024, 3, 2, 1)
        )

    def forward(self, pages: Tensor) -> Tensor:
        """The features that a language model reads."""
        tokens = self.blocks(self.patches(pages).permute(0, 2, 3, 1))
        return self.neck(tokens.permute(0, 3, 1, 2))


def padded(sizes: Sequence[tuple[int, int]], pixels: int) -> Tensor:
    """Random pages of these heights and widths in one batch; what is missing to the right and below is grey."""
    pages = torch.zeros(len(sizes), 3, pixels, pixels)
    for page, (height, width) in zip(pages, sizes, strict=True):
        page[:, :height, :width] = torch.randn(3, height, width)
    return pages


def seconds(encoder: Encoder, pages: Tensor) -> tuple[float, Tensor]:
    """Seconds of a second call, and its features."""
    encoder(pages)
    start = time.perf_counter()
    features = encoder(pages)
    return time.perf_counter() - start, features


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Encodes a batch both ways, and says how far the features differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, default=640)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    sizes = (options.pixels, options.dim, options.depth)
    ours, plain = Encoder(Attention, *sizes).eval(), Encoder(PlainAttention, *sizes).eval()
    plain.load_state_dict(ours.state_dict())
    side = options.pixels
    pages = padded([(side, side // 2), (side // 2, side)], side)
    exact = plain(pages)
    before, theirs = seconds(plain.bfloat16(), pages.bfloat16())
    after, found = seconds(ours.bfloat16(), pages.bfloat16())
    errors = [float((x.float() - exact).abs().max() / exact.abs().max()) for x in (theirs, found)]
    print(f"{before:.2f} s -> {after:.2f} s, {before / after:.2f}x as fast")
    print(
        f"bfloat16 is off by {errors[0]:.1e} with torch's attention, by {errors[1]:.1e} with ours"
    )


if __name__ == "__main__":
    main()
