"""Cuts a grid of tokens into windows without padding it, for `rel_pos_attention`."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WindowGroup:
    """Equal windows side by side: `rows` x `columns` of them, each `height` x `width` real tokens.

    Their first token is at (`top`, `left`) of the grid. A window's keys are `key_height` x
    `key_width` tokens, more than its queries where padding tokens are keys.
    """

    top: int
    left: int
    rows: int
    columns: int
    height: int
    width: int
    key_height: int
    key_width: int

    @property
    def tokens(self) -> int:
        """Tokens of an image in the group."""
        return self.rows * self.columns * self.height * self.width

    def view(self, grid: Tensor) -> Tensor:
        """The group's part of a grid (B, h, w, heads, d), a view (B, rows, columns, heads, y, x, d)."""
        bottom = self.top + self.rows * self.height
        right = self.left + self.columns * self.width
        part = grid[:, self.top : bottom, self.left : right]
        split = part.unflatten(2, (self.columns, self.width))
        return split.unflatten(1, (self.rows, self.height)).permute(0, 1, 3, 5, 2, 4, 6)

    def queries(self, grid: Tensor) -> Tensor:
        """The group's tokens, contiguous: (G, height * width, d), G counting windows' heads."""
        return self.view(grid).flatten(4, 5).flatten(0, 3).contiguous()

    def keys(self, grid: Tensor, padding: Tensor | None) -> Tensor:
        """The same with the padding tokens, which are (heads, d) or zero: (G, keys, d)."""
        real = self.view(grid)
        if (self.height, self.width) == (self.key_height, self.key_width):
            return real.flatten(4, 5).flatten(0, 3).contiguous()
        keys = grid.new_zeros(*real.shape[:4], self.key_height, self.key_width, real.shape[-1])
        if padding is not None:
            keys += padding[:, None, None]
        keys[..., : self.height, : self.width, :] = real
        return keys.flatten(4, 5).flatten(0, 3)

    def write_queries(self, tokens: Tensor, grid: Tensor) -> None:
        """Writes tokens (G, height * width, d) to their places in a grid (B, h, w, heads, d)."""
        view = self.view(grid)
        view.copy_(tokens.view(view.shape))

    def write_keys(self, tokens: Tensor, grid: Tensor) -> Tensor:
        """Writes the real ones of (G, keys, d) to their places; the sum of the rest, (heads, d)."""
        view = self.view(grid)
        size = (*view.shape[:4], self.key_height, self.key_width, view.shape[-1])
        tokens = tokens.view(size)
        view.copy_(tokens[..., : self.height, : self.width, :])
        below = tokens[..., self.height :, :, :]
        beside = tokens[..., : self.height, self.width :, :]
        return below.sum((0, 1, 2, 4, 5)) + beside.sum((0, 1, 2, 4, 5))


def window_groups(h: int, w: int, window_size: int, pad_mode: str) -> Iterator[WindowGroup]:
    """Cuts the grid into at most four groups: whole windows, the right, the bottom, the corner."""
    for top, rows, height in stretches(h, window_size or h):
        for left, columns, width in stretches(w, window_size or w):
            are_keys = window_size > 0 and pad_mode == "bias"
            keys = (window_size, window_size) if are_keys else (height, width)
            yield WindowGroup(top, left, rows, columns, height, width, *keys)


def stretches(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """First token, number and length of the whole windows along an axis, then of the rest."""
    whole = length // size
    if whole:
        yield 0, whole, size
    if length % size:
        yield whole * size, 1, length % size
