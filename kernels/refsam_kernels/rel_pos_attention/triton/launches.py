"""The launches of the Triton kernels of `rel_pos_attention`: grids, tiles and arguments.

Tensors may be on the meta device: then a launch can be compiled ahead, but not run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from refsam_kernels.core.triton_aot import Launch
from refsam_kernels.rel_pos_attention.triton.backward import (
    _key_gradient_kernel,
    _query_gradient_kernel,
)
from refsam_kernels.rel_pos_attention.triton.forward import _forward_kernel
from refsam_kernels.rel_pos_attention.triton.table_gradient import _table_gradient_kernel

TUNED = Path(__file__).parent / "tuned.json"
# Programs that a table's gradient is split over: fixed, so that its sum is the same on every GPU.
SPLITS = 128
TABLE_BLOCK, TABLE_CHUNK = 64, 32  # tokens and rows of the table at a time
# Rows of a table that queries are multiplied with at a time; more would spill.
CHUNK = 16
# Windows of at least so many keys, as in global attention, get the largest tiles of sm_90.
LARGE_WINDOW = 1024
KERNELS = {
    "forward": _forward_kernel,
    "query_gradient": _query_gradient_kernel,
    "key_gradient": _key_gradient_kernel,
}


@dataclass(frozen=True)
class Tile:
    """Tile of a kernel: `block` queries against `rows` x `columns` keys of a window."""

    block: int
    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Problem:
    """The sizes of one call; `window_h` x `window_w` is the grid itself for global attention."""

    images: int
    h: int
    w: int
    heads: int
    head_dim: int
    window_h: int
    window_w: int
    pad_mode: str
    dtype: torch.dtype
    architecture: int
    device_name: str = ""  # of the GPU, as CUDA has it: "NVIDIA H200"

    @classmethod
    def of(cls, qkv: Tensor, num_heads: int, window_size: int, pad_mode: str) -> "Problem":
        """The problem that the operator's arguments pose on the device of qkv."""
        images, h, w, width = qkv.shape
        window = (window_size or h, window_size or w)
        head_dim = width // (3 * num_heads)
        sizes = (images, h, w, num_heads, head_dim, *window)
        return cls(*sizes, pad_mode, qkv.dtype, *gpu_of(qkv.device))

    @property
    def windows(self) -> int:
        """Windows and heads of all images."""
        across = triton.cdiv(self.h, self.window_h) * triton.cdiv(self.w, self.window_w)
        return self.images * self.heads * across

    @property
    def is_partial(self) -> bool:
        """Whether some windows stick out of the grid."""
        return bool(self.h % self.window_h or self.w % self.window_w)

    @property
    def is_padded(self) -> bool:
        """Whether there are padding tokens that are keys."""
        return self.is_partial and self.pad_mode == "bias"

    @property
    def is_cropped(self) -> bool:
        """Whether some windows have fewer keys than others."""
        return self.is_partial and not self.is_padded

    def tuned_name(self, kernel: str) -> str:
        """The key of this kernel and problem in the table of tuned tiles."""
        bits = 8 * self.dtype.itemsize
        return f"{kernel} {self.head_dim} {bits}-bit {self.window_h}x{self.window_w}"

    @property
    def tuned_keys(self) -> tuple[str, ...]:
        """Keys of this GPU's tuned tiles: its name, then its architecture."""
        return tuple(filter(None, (self.device_name, f"sm_{self.architecture}")))

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel: the tuned one if there is one, else the default."""
        name = self.tuned_name(kernel)
        entries = (tuned().get(key, {}).get(name) for key in self.tuned_keys)
        entry = next(filter(None, entries), None)
        return Tile(**entry) if entry else default_tile(kernel, self)


def gpu_of(device: torch.device) -> tuple[int, str]:
    """Architecture, 90 for sm_90, and name; where there is no GPU 80, the oldest, and none."""
    if device.type != "cuda":
        return 80, ""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_name(device)


@cache
def tuned() -> dict[str, dict[str, dict[str, int]]]:
    """The tiles that the GPU report's tuning found: by GPU or architecture, then kernel and sizes; fields of `Tile`."""
    return json.loads(TUNED.read_text())


def columns_for(width: int, most: int) -> int:
    """Columns of a tile of keys, at most `most`: the widest of those that waste least of a window's rows."""
    candidates = [columns for columns in (64, 32, 16) if columns <= most]
    return min(candidates, key=lambda columns: triton.cdiv(width, columns) * columns)


def default_tile(kernel: str, problem: Problem) -> Tile:
    """A tile that no architecture spills: the compile gate holds it to that."""
    block, keys, num_warps, num_stages = 64, 64, 4, 2
    if problem.dtype == torch.float32:  # without tensor cores
        block, keys, num_warps, num_stages = 32, 32, 8, 1
    elif 100 <= problem.architecture < 120:  # accumulators lie outside the registers
        num_warps = 8
    elif problem.architecture >= 120:
        keys = 32
    # With more than 64 channels the sums alone fill the registers: in float32, and of two gradients if all lie in registers.
    is_wide, is_single = problem.head_dim > 64, problem.dtype == torch.float32
    if kernel == "query_gradient":
        keys = 16 if is_wide and is_single else 32
    elif kernel == "key_gradient":
        block = 16 if is_wide and (is_single or not 90 <= problem.architecture < 120) else 32
    if problem.architecture == 90 and problem.dtype != torch.float32:
        return hopper_tile(kernel, problem, block, keys)
    columns = columns_for(problem.window_w, keys)
    return Tile(block, keys // columns, columns, num_warps, num_stages)


def hopper_tile(kernel: str, problem: Problem, block: int, keys: int) -> Tile:
    """The tile for sm_90: a third stage, so that two copies are under way, and larger tiles.

    Most of the L2 cache's traffic is keys that every block of queries reads again, and queries that every tile of keys reads
    again: larger tiles read less.
    """
    area = problem.window_h * problem.window_w
    if area >= LARGE_WINDOW:
        block, keys = (64, 128) if kernel == "key_gradient" else (128, 64)
    elif area > block and kernel != "key_gradient":
        block = 128
    columns = columns_for(problem.window_w, min(keys, 64))
    num_warps = 8 if max(block, keys) == 128 else 4
    return Tile(block, keys // columns, columns, num_warps, num_stages=3)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """A head's channels as two powers of two, 80 = 64 + 16; (128, 0) where splitting saves nothing."""
    whole = max(16, triton.next_power_of_2(head_dim))
    if whole == head_dim or whole == 16:
        return whole, 0
    half = whole // 2
    rest = max(16, triton.next_power_of_2(head_dim - half))
    return (half, rest) if rest < half else (whole, 0)


@dataclass(frozen=True)
class Operands:
    """The operator's tensors: qkv with any strides, the others contiguous."""

    qkv: Tensor
    rel_pos_h: Tensor
    rel_pos_w: Tensor
    qkv_bias: Tensor | None

    def scratch(self, problem: Problem, *, zero: bool = False) -> tuple[Tensor, Tensor]:
        """Memory for relative terms, float32: (B, heads, window_h, h*w) and (B, heads, h*w, window_w)."""
        planes, tokens = (problem.images, problem.heads), problem.h * problem.w
        create = self.qkv.new_zeros if zero else self.qkv.new_empty
        rel_h = create(*planes, problem.window_h, tokens, dtype=torch.float32)
        return rel_h, create(*planes, tokens, problem.window_w, dtype=torch.float32)


def forward_launch(
    problem: Problem, operands: Operands, out: Tensor, log_sum_exp: Tensor
) -> Launch:
    """One program per tile of queries of a window and head."""
    rel_h, rel_w = operands.scratch(problem)
    tensors = {"rel_h": rel_h, "rel_w": rel_w, "out": out, "log_sum_exp": log_sum_exp}
    return launch_of("forward", problem, operands, tensors)


def launch_of(
    name: str, problem: Problem, operands: Operands, tensors: Mapping[str, Tensor | None]
) -> Launch:
    """The launch of one of `KERNELS`; `tensors` by the kernel's names.

    One program per window, head and tile: of keys for the keys' gradient, else of queries.
    """
    tile = problem.tile(name)
    of_queries = triton.cdiv(problem.window_h * problem.window_w, tile.block)
    tiles = key_tiles(problem) if name == "key_gradient" else of_queries
    is_whole = problem.window_h % tile.rows == 0 and problem.window_w % tile.columns == 0
    values = {
        **values_of(problem, operands.qkv),
        **tensors,
        "qkv_bias": operands.qkv_bias if problem.is_padded else None,
        "table_h": operands.rel_pos_h,
        "table_w": operands.rel_pos_w,
        "tiles": tiles,
        "scale": problem.head_dim**-0.5,
        "WINDOW_H": problem.window_h,
        "WINDOW_W": problem.window_w,
        "BLOCK": tile.block,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "CHUNK": CHUNK,
        "PARTIAL": problem.is_partial,
        "PADDED": problem.is_padded,
        "MASKED": problem.is_cropped or not is_whole,
    }
    programs = (problem.windows * tiles,)
    return Launch.choosing(KERNELS[name], programs, values, tile.num_warps, tile.num_stages)


def key_tiles(problem: Problem) -> int:
    """Tiles of keys in a window, padding tokens included."""
    tile = problem.tile("key_gradient")
    return triton.cdiv(problem.window_h, tile.rows) * triton.cdiv(problem.window_w, tile.columns)


def table_parts(problem: Problem, qkv: Tensor, *, of_rows: bool) -> Tensor:
    """Memory for the partial sums of a table's gradient: (splits, 2*size-1, head_dim) float32."""
    tiles = triton.cdiv(problem.h * problem.w, TABLE_BLOCK) * problem.images * problem.heads
    size = problem.window_h if of_rows else problem.window_w
    shape = (max(1, min(SPLITS, tiles)), 2 * size - 1, problem.head_dim)
    return qkv.new_empty(shape, dtype=torch.float32)


def table_gradient_launch(
    problem: Problem, qkv: Tensor, d_rel: Tensor, parts: Tensor, *, of_rows: bool
) -> Launch:
    """One program per part and chunk of the table of one axis."""
    size, tokens = (problem.window_h if of_rows else problem.window_w), problem.h * problem.w
    tiles = triton.cdiv(tokens, TABLE_BLOCK)
    in_all = tiles * problem.images * problem.heads
    values = {
        **values_of(problem, qkv),
        "d_rel": d_rel,
        "parts": parts,
        "key_stride": tokens if of_rows else 1,
        "token_stride": 1 if of_rows else size,
        "tiles": tiles,
        "tiles_each": triton.cdiv(in_all, len(parts)),
        "tiles_in_all": in_all,
        "SIZE": size,
        "OF_ROWS": of_rows,
        "BLOCK": TABLE_BLOCK,
        "CHUNK": TABLE_CHUNK,
    }
    programs = (len(parts), triton.cdiv(2 * size - 1, TABLE_CHUNK))
    return Launch.choosing(_table_gradient_kernel, programs, values, num_warps=4, num_stages=2)


def values_of(problem: Problem, qkv: Tensor) -> dict[str, Any]:
    """The arguments that all kernels take, by their names."""
    d0, d1 = split_head_dim(problem.head_dim)
    strides = zip(("stride_b", "stride_y", "stride_x", "stride_c"), qkv.stride(), strict=True)
    sizes = {"h": problem.h, "w": problem.w, "heads": problem.heads}
    return {"qkv": qkv, **dict(strides), **sizes, "HEAD_DIM": problem.head_dim, "D0": d0, "D1": d1}
