"""The image encoder's patch embedding, blocks and neck in 8-bit integers, for inference on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.block import VIT_EPS, Block, BlockWeights, attend
from refsam_kernels import (
    Int8Weights,
    MLPWeights,
    int8_linear,
    int8_mlp,
    quantise_weights,
    say_if_slow,
)


class Int8Block:
    """`run_block` on a CPU, for fused float32 weights and without autograd; it computes its norms itself.

    Products in 8-bit integers: qkv, proj, MLP, adapters, and queries with keys in global attention. The rest of attention is
    in attention_dtype, sums are in float32.
    """

    def __init__(
        self,
        weights: BlockWeights,
        norm1: tuple[Tensor, Tensor],
        attention_dtype: torch.dtype,
    ) -> None:
        self.norm1 = norm1
        self.norm2 = (weights.norm_weight, weights.norm_bias)
        self.attention_dtype = attention_dtype
        # In windows, which have few keys, bfloat16 takes as long.
        self.has_int8_scores = not weights.window_size
        self.qkv = quantise_weights(weights.qkv_weight, weights.qkv_bias)
        self.proj = quantise_weights(weights.proj_weight, weights.proj_bias)
        space = weights.space_adapter
        self.space_adapter = None if space is None else _quantised(space)
        self.mlp = _quantised(weights.mlp)
        self.rest = weights.without_matrices()._replace(
            qkv_bias=weights.qkv_bias.to(attention_dtype),
            rel_pos_h=weights.rel_pos_h.to(attention_dtype),
            rel_pos_w=weights.rel_pos_w.to(attention_dtype),
        )

    def __call__(
        self, x: Tensor, normed: Tensor | None, next_norm: nn.LayerNorm | None
    ) -> tuple[Tensor, None]:
        """See `run_block`; there is no norm to hand on."""
        x = x.contiguous()  # channels-first in memory behind the patch embedding
        qkv = int8_linear(x, self.qkv, norm=self.norm1, eps=VIT_EPS, dtype=self.attention_dtype)
        with torch.autocast("cpu", enabled=False):
            attention = attend(self.rest, qkv, int8_scores=self.has_int8_scores)
        if self.space_adapter is None:
            x = int8_linear(attention, self.proj, residual=x, dtype=x.dtype)
        else:
            projected = int8_linear(attention, self.proj, dtype=x.dtype)
            x = int8_mlp(projected, *self.space_adapter, residual=x + projected)
        return int8_mlp(x, *self.mlp, norm=self.norm2, residual=x, eps=VIT_EPS), None


class Int8Patches:
    """The patch embedding as a linear layer: each patch is a row."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        self.size = convolution.kernel_size[0]
        self.weights = quantise_weights(convolution.weight.flatten(1), convolution.bias)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels to (B, h, w, D)."""
        size = self.size
        patches = pixels.unflatten(2, (-1, size)).unflatten(4, (-1, size))  # (B, 3, h, s, w, s)
        return int8_linear(patches.permute(0, 2, 4, 1, 3, 5).flatten(3), self.weights)


class Int8Neck:
    """The neck as two linear layers: a row of the second is a token and its eight neighbours."""

    def __init__(self, neck: nn.Sequential) -> None:
        layers: list[Any] = list(neck)
        first, norm1, second, norm2 = layers
        self.norms = [
            (n.weight.shape, n.weight.clone(), n.bias.clone(), n.eps) for n in (norm1, norm2)
        ]
        self.first = quantise_weights(first.weight.flatten(1))
        self.second = quantise_weights(second.weight.permute(0, 2, 3, 1).flatten(1))

    def __call__(self, x: Tensor) -> Tensor:
        """(B, h, w, D) to (B, h, w, C)."""
        x = F.layer_norm(int8_linear(x, self.first), *self.norms[0])
        windows = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)  # (B, h, w, C, 3, 3)
        neighbours = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return F.layer_norm(int8_linear(neighbours, self.second), *self.norms[1])


def _quantised(weights: MLPWeights) -> tuple[Int8Weights, Int8Weights]:
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    return quantise_weights(fc1_weight, fc1_bias), quantise_weights(fc2_weight, fc2_bias)


def check_int8(parameters: Sequence[nn.Parameter]) -> None:
    """Warns where the CPU has no instructions for it. Raises ValueError unless parameters are float32 or bfloat16 on a CPU."""
    for parameter in parameters:
        if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"dtype: got torch.int8 for {parameter.dtype} parameters on {parameter.device}, wanted "
                "torch.float32 or torch.bfloat16 parameters on a CPU"
            )
    say_if_slow()


def norm_of(block: Block) -> tuple[Tensor, Tensor]:
    """Copies of the block's first norm's weight and bias, float32."""
    norm = block.norm1
    return norm.weight.detach().float().clone(), norm.bias.detach().float().clone()
