"""SAM's ViT with adapters, channels-last from the patch embedding on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from refsam import renamed
from refsam.model.block import Block
from refsam.model.int8_block import Int8Neck, Int8Patches, check_int8
from refsam.model.layer_norm import LayerNorm2d
from refsam.model.packed_conv import PackedConv, can_pack
from refsam.model.packing import PackedModule, Packing, RunBlock, arrange_block
from refsam_kernels import PackedLinear


class PatchEmbedding(nn.Module):
    """One convolution that cuts an image into patches."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels to (B, h, w, D)."""
        return self.proj(pixels).permute(0, 2, 3, 1)


class Parts(NamedTuple):
    """Callables for the patch embedding, each block and the neck, (B, h, w, D) to (B, h, w, C).

    dtype is that of normalised tokens, None for the tokens' own.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: Sequence[RunBlock]
    neck: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None


def _run_neck(neck: nn.Module, x: Tensor) -> Tensor:
    # Inside segment-anything the tokens lie channels-first in memory; a convolution's bits depend on it.
    features: Tensor = neck(x.permute(0, 3, 1, 2).contiguous())
    return features.permute(0, 2, 3, 1)


class _PackedNeck:
    """The neck without copies between channels first and last, and with packed weights; autocast takes the module."""

    def __init__(self, neck: nn.Sequential) -> None:
        self._neck = neck
        layers: list[Any] = list(neck)
        first, self._norm1, second, self._norm2 = layers
        self._first = PackedLinear(first.weight.flatten(1), None)
        self._second = PackedConv(second)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, h, w, D) to (B, h, w, C)."""
        if torch.is_autocast_enabled("cpu"):
            return _run_neck(self._neck, x)
        x = self._norm1.on_last(self._first(x))
        return self._norm2.on_last(self._second(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ImageEncoder(PackedModule):
    """SAM's image encoder (segment-anything, modeling/image_encoder.py) with adapters.

    Adapters stand in the second half of the blocks (paper, section 3.2). Parameter names are
    SAM's, the adapters' the authors'. Nothing is recorded for backward before the first
    parameter that is trained, so a frozen first half costs what it costs under `no_grad`. With
    `activation_checkpointing` a block keeps only its input for the backward, which then computes it again.
    """

    activation_checkpointing = False
    recompute = renamed.attribute("ImageEncoder", "recompute")

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
        crops: bool = False,
    ) -> None:
        super().__init__()
        self.crops = crops
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
                crops=crops,
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

    def forward(self, pixels: Tensor, added: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Normalised pixels (B, 3, H, W) float to the neck's output and the intermediate features.

        added (B, h, w, D) is added to the patches' tokens, unless it is None.

        Returns (B, h, w, C) and, for each global block but the last, its output (B, h, w, D).
        H and W must be multiples of the patch size; position tables are interpolated if the grid has another
        size. An encoder that crops gives a rectangle the upper left positions of the square of its longer
        side. Raises ValueError for other shapes.
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
        parts = self._parts()
        x = parts.embed(pixels)
        x = x + self.position_table(x.shape[1], x.shape[2])
        if added is not None:
            x = x + added
        norms: list[Any] = [*(block.norm1 for block in self.blocks), None]
        normed = norms[0](x).to(parts.dtype or x.dtype) if parts.dtype != torch.int8 else None
        intermediates = []
        for index, (run, next_norm) in enumerate(zip(parts.blocks, norms[1:], strict=True)):
            x, normed = run(x, normed, next_norm)
            if index in self.intermediate_blocks:
                intermediates.append(x)
        return parts.neck(x), intermediates

    def position_table(self, height: int, width: int) -> Tensor:
        """The absolute positions (1, height, width, D), bicubic where the grid, or the square that is cropped, differs."""
        table: Tensor = self.pos_embed
        size = height, width
        if self.crops:
            size = max(size), max(size)
        if table.shape[1:3] != size:
            channels_first = table.permute(0, 3, 1, 2).float()
            resized = F.interpolate(channels_first, size=size, mode="bicubic")
            table = resized.permute(0, 2, 3, 1).to(table.dtype)
        return table if size == (height, width) else table[:, :height, :width]

    @staticmethod
    def arrange(part: Any, dtype: torch.dtype) -> Any:
        """A callable for a part of the encoder with products in this dtype; only torch.int8 changes the ends."""
        if isinstance(part, Block):
            return arrange_block(part, dtype)
        is_neck = isinstance(part, nn.Sequential)
        if dtype == torch.int8:
            return Int8Neck(part) if is_neck else Int8Patches(part.proj)
        if is_neck and can_pack(part[0]):
            return _PackedNeck(part)
        return partial(_run_neck, part) if is_neck else part

    def optimize(
        self,
        dtype: torch.dtype | None = None,
        *,
        release_weights: bool = False,
        fixed_weights: bool = False,
    ) -> Self:
        """Use packed weights whenever autograd is off; returns the encoder.

        dtype of the matrix products: None means bfloat16 for wide encoders on CPUs with bfloat16 instructions,
        else the parameters' own; autocast overrides both. torch.int8 is for CPUs: weights are rounded to 255 steps
        per output channel, each token to 255 steps between its extremes; attention has the dtype of None. Sums,
        softmax and norms stay in float32. See `refsam.model.packing`. Parameters and state dict do not change, and
        changes to them are noticed, unless the caller promises fixed_weights, which saves the time of looking for
        them at each call. release_weights (with torch.int8 only) frees the blocks' float matrices; after
        that `deoptimize`, `train`, `state_dict` and autograd raise RuntimeError. Raises ValueError in training mode
        or for another dtype.
        """
        if self.training:
            raise ValueError("optimize: got an encoder in training mode, wanted eval() before it")
        if dtype is not None and not dtype.is_floating_point and dtype != torch.int8:
            raise ValueError(
                f"dtype: got {dtype}, wanted a floating-point type, torch.int8 or None"
            )
        if release_weights and dtype != torch.int8:
            raise ValueError(f"release_weights: got True with dtype {dtype}, wanted torch.int8")
        if self.packing is None or not self.packing.matches(dtype, fixed_weights):
            self._refuse_if_released("optimize in another way")
            if dtype == torch.int8:
                check_int8([*self.parameters()])
            self.packing = Packing(dtype, self.arrange, fixed_weights)
        if release_weights and not self.packing.is_frozen:
            self.packing.freeze([self.patch_embed, *self.blocks, self.neck])
            self._release()
        return self

    def _release(self) -> None:
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._refuse_if_released("state_dict()")
        super()._save_to_state_dict(*arguments)

    def _refuse_if_released(self, what: str) -> None:
        if self.packing is not None and self.packing.is_frozen:
            raise RuntimeError(
                f"{what}: got an encoder whose float weights were released by optimize(release_weights="
                "True), wanted one that has them: load the model again"
            )

    def deoptimize(self) -> Self:
        """Undo `optimize`: the packed weights are dropped, results are those from before, bit by bit."""
        self._refuse_if_released("deoptimize()")
        return super().deoptimize()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, which undoes `optimize`."""
        if mode:
            self._refuse_if_released("train()")
        return super().train(mode)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the blocks' matrix products where autograd is off."""
        return self.packing.dtype_of(self.pos_embed) if self.packing else self.pos_embed.dtype

    def _parts(self) -> Parts:
        """The callables that compute the encoder now."""
        recording, packing = torch.is_grad_enabled(), self.usable_packing
        if recording:
            self._refuse_if_released("autograd")
        if packing is not None:
            dtype = packing.dtype_of(self.pos_embed)
            modules = [self.patch_embed, *self.blocks, self.neck]
            embed, *arranged, neck = packing.arranged(modules, dtype)
            return Parts(embed, arranged, neck, dtype)
        blocks: list[Any] = [*self.blocks]
        if self.activation_checkpointing and recording:
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            blocks = [partial(again, block) for block in blocks]
        return Parts(self.patch_embed, blocks, partial(_run_neck, self.neck), None)
