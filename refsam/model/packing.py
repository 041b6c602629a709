"""The ViT's blocks arranged for inference, next to their parameters, which stay as they are.

Every tensor is in the dtype of the products (torch.int8: see `refsam.model.int8_block`). A block's MLP and its
adapter are one perceptron, exactly:
`[W2 | s A2] gelu([W1; A1] n + [b1; a1]) + (b2 + s a2)`. On a CPU linear layers hold their weights in
oneDNN's own layout, and the GELU is computed where the product is.
"""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.block import ADAPTER_SCALE, VIT_EPS, Block, BlockWeights, attend, run_block
from refsam.model.int8_block import Int8Block, norm_of
from refsam_kernels import (
    Fingerprint,
    MLPWeights,
    PackedLinear,
    can_prepack,
    has_bfloat16,
    is_capturing,
    settle,
)

RunBlock = Callable[[Tensor, Any, nn.LayerNorm | None], tuple[Tensor, Tensor | None]]

# Narrower encoders lose more to conversions than bfloat16 gains.
LEAST_WIDTH_OF_BFLOAT16 = 128
# Tokens that an MLP computes at a time on a CPU, so that hidden values stay in the cache.
ROWS = 1024
_ATTENTION_TENSORS = BlockWeights._fields[:6]  # up to the output projection


class Packing:
    """Blocks arranged for inference; arranged again when weights, device or dtype have changed.

    dtype is that of the products; None means `automatic_dtype`. Autocast overrides both, but not torch.int8.
    `arrange(module, dtype)` returns a callable that computes the module in that dtype. With fixed_weights changes of
    weights are not looked for.
    """

    is_frozen = False

    def __init__(
        self,
        dtype: torch.dtype | None,
        arrange: Callable[[Any, torch.dtype], Any],
        fixed_weights: bool = False,
    ) -> None:
        self.dtype, self.fixed_weights = dtype, fixed_weights
        self._arrange = arrange
        self._fingerprint = Fingerprint()
        self._made: tuple[Hashable, list[Any]] | None = None

    def dtype_of(self, weight: Tensor) -> torch.dtype:
        """The dtype of products with such a weight (..., D)."""
        if self.dtype == torch.int8:
            return self.dtype
        device_type = weight.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.dtype or automatic_dtype(weight)

    def arranged(self, modules: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """The functions that compute the modules with products in this dtype; see `run_block` for the ViT's blocks."""
        if self.is_frozen and self._made is not None:
            return self._made[1]
        key = (dtype, None if self.fixed_weights else self._fingerprint(_weights(modules)))
        made = self._made
        if made is None or made[0] != key:
            # Tensors made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                made = key, [self._arrange(module, dtype) for module in modules]
            weights = _weights(modules)
            # Tensors made while a CUDA graph is captured lie in the graph's own memory and must not be kept.
            if weights and is_capturing(weights[0]):
                return made[1]
            settle(weights)
            self._made = made
        return made[1]

    def matches(self, dtype: torch.dtype | None, fixed_weights: bool) -> bool:
        """Whether it was made with these settings."""
        return (self.dtype, self.fixed_weights) == (dtype, fixed_weights)

    def freeze(self, modules: Sequence[Any]) -> None:
        """Arrange the modules in this packing's dtype permanently: their weights may be freed."""
        if self.dtype is None:
            raise ValueError("dtype: got None, wanted a fixed one")
        self.arranged(modules, self.dtype)
        self.is_frozen = True

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave the blocks behind, unless frozen: tensors in oneDNN's layout have no storage."""
        made = self._made if self.is_frozen else None
        return {**self.__dict__, "_fingerprint": Fingerprint(), "_made": made}


class PackedModule(nn.Module):
    """A module that has its `packing` after `optimize`, for calls without autograd.

    A subclass implements `arrange`, as `Packing` takes it, and uses `usable_packing` in its forward.
    """

    packing: Packing | None = None

    @property
    def usable_packing(self) -> Packing | None:
        """The packing where it may compute: with autograd off and, unless it holds the only weights, outside `torch.compile`."""
        packing = self.packing
        if packing is None or torch.is_grad_enabled():
            return None
        return None if torch.compiler.is_compiling() and not packing.is_frozen else packing

    @staticmethod
    @abstractmethod
    def arrange(part: Any, dtype: torch.dtype) -> Any:
        """A callable that computes a part of the module in this dtype."""

    def optimize(self, dtype: torch.dtype | None = None, *, fixed_weights: bool = False) -> Self:
        """Compute with packed weights wherever autograd is off; both as for `ImageEncoder.optimize`."""
        if self.packing is None or not self.packing.matches(dtype, fixed_weights):
            self.packing = Packing(dtype, self.arrange, fixed_weights)
        return self

    def deoptimize(self) -> Self:
        """Undo `optimize`."""
        self.packing = None
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training mode, which undoes `optimize`."""
        if mode:
            self.deoptimize()
        return super().train(mode)


def _weights(modules: Sequence[Any]) -> list[Tensor]:
    return [parameter for module in modules for parameter in module.parameters()]


def automatic_dtype(weight: Tensor) -> torch.dtype:
    """bfloat16 for float32 weights of a wide encoder on a CPU with instructions for it, else the weights'."""
    is_wide = weight.shape[-1] >= LEAST_WIDTH_OF_BFLOAT16
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and is_wide and has_bfloat16():
        return torch.bfloat16
    return weight.dtype


def arrange_block(block: Block, dtype: torch.dtype) -> RunBlock:
    """`pack` of a block's own weights; `Int8Block` for torch.int8."""
    if dtype == torch.int8:
        attention_dtype = automatic_dtype(block.attn.qkv.weight)
        return Int8Block(fuse(block.weights(), torch.float32), norm_of(block), attention_dtype)
    return pack(block.weights(), dtype)


def pack(weights: BlockWeights, dtype: torch.dtype) -> RunBlock:
    """A block arranged for inference with products in this dtype."""
    weights = fuse(weights, dtype)
    if can_prepack(weights.qkv_weight):
        return PackedBlock(weights)
    return partial(run_block, weights)


def fuse(weights: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """The same block with one perceptron, and everything but the norm in this dtype."""
    mlp, adapter = weights.mlp, weights.mlp_adapter
    if adapter is not None:
        mlp = MLPWeights(
            torch.cat([mlp.fc1_weight, adapter.fc1_weight]),
            torch.cat([mlp.fc1_bias, adapter.fc1_bias]),
            torch.cat([mlp.fc2_weight, ADAPTER_SCALE * adapter.fc2_weight], 1),
            mlp.fc2_bias + ADAPTER_SCALE * adapter.fc2_bias,
        )
    space = weights.space_adapter
    attention = {name: getattr(weights, name).to(dtype) for name in _ATTENTION_TENSORS}
    return weights._replace(
        **attention,
        space_adapter=None if space is None else MLPWeights(*(t.to(dtype) for t in space)),
        mlp=MLPWeights(*(tensor.to(dtype) for tensor in mlp)),
        mlp_adapter=None,
    )


class PackedPerceptron:
    """Two linear layers with an exact GELU between them."""

    def __init__(self, weights: MLPWeights) -> None:
        self.fc1 = PackedLinear(weights.fc1_weight, weights.fc1_bias, gelu=True)
        self.fc2 = PackedLinear(weights.fc2_weight, weights.fc2_bias)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(self.fc1(x))


class PackedBlock:
    """`run_block` on a CPU, for fused weights and without autograd."""

    def __init__(self, weights: BlockWeights) -> None:
        self.qkv = PackedLinear(weights.qkv_weight, weights.qkv_bias)
        self.proj = PackedLinear(weights.proj_weight, weights.proj_bias)
        space = weights.space_adapter
        self.space_adapter = None if space is None else PackedPerceptron(space)
        self.mlp = PackedPerceptron(weights.mlp)
        self.rest = weights.without_matrices()

    def __call__(
        self, x: Tensor, normed: Tensor, next_norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `run_block`."""
        with torch.autocast("cpu", enabled=False):
            projected = self.proj(attend(self.rest, self.qkv(normed)))
            if self.space_adapter is not None:
                projected += self.space_adapter(projected)
            x = (x + projected).contiguous()  # channels-first in memory behind the patch embedding
            norm = (self.rest.norm_weight, self.rest.norm_bias, VIT_EPS)
            normed = F.layer_norm(x, x.shape[-1:], *norm).to(projected.dtype)
            x_rows, normed_rows = x.flatten(0, -2), normed.flatten(0, -2)
            for x_part, part in zip(x_rows.split(ROWS), normed_rows.split(ROWS), strict=True):
                x_part += self.mlp(part)
            return x, None if next_norm is None else next_norm(x).to(normed.dtype)
