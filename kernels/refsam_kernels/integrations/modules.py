"""Replacements of single modules of a SAM image encoder: its attention, its MLP, its neck's norm."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam_kernels.frozen_linear import FrozenCopy, frozen_mlp
from refsam_kernels.int8_linear.copy import Int8Copy
from refsam_kernels.int8_linear.op import int8_mlp
from refsam_kernels.integrations.norm_again import normed_again
from refsam_kernels.integrations.replacement import Replacement
from refsam_kernels.packed_linear import (
    PackedCopy,
    dtype_of_call,
    has_bfloat16,
    has_plain_weights,
    is_plain_linear,
    is_unhooked,
)
from refsam_kernels.rel_pos_attention.op import rel_pos_attention

# Tokens that an MLP computes at a time on a CPU, so that intermediate results stay in the cache.
ROWS = 1024
# An MLP's two linear layers as libraries call them, and the modules beside them, which may do nothing only.
LAYERS = (("lin1", "lin2"), ("fc1", "fc2"))
IDLE = {"drop", "drop1", "drop2", "norm"}


class Linear:
    """Calls a linear module, or a packed copy of its weights where one may stand for it: in inference, and while it is frozen."""

    def __init__(self) -> None:
        self.packed = PackedCopy()
        self.frozen = FrozenCopy(self.packed)

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        result = self.product(module, x) if is_unhooked(module) else None
        return module(x) if result is None else result

    def product(self, module: Any, x: Tensor) -> Tensor | None:
        """(..., in) to (..., out) by a packed copy; None where there can be none."""
        if self.packed.is_supported(module, x):
            return self.packed(module, x)
        return self.frozen(module, x) if self.frozen.is_supported(module, x) else None


class LinearForward(Linear):
    """`Linear` in the place of the module's own `forward`, where another module calls it."""

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        result = self.product(module, x)
        return type(module).forward(module, x) if result is None else result


def wrapped_linear_replacements(path: str, layer: Any) -> Iterator[Replacement]:
    """The replacements of plain linear modules within one that wraps them, as LoRA's layers do; none of a plain one itself."""
    for name, module in layer.named_modules():
        if name and has_plain_weights(module) and "forward" not in vars(module):
            yield Replacement(f"{path}.{name}", module, LinearForward(), parameters=("input",))


class Attend:
    """SAM's attention on a grid of tokens, in the place of an attention module; no windows are copied.

    `window_size` 0 attends globally. `qkv` and `proj` are called as modules, unless packed copies may
    stand for them. Follows segment-anything `modeling/image_encoder.py`, `Block` and `Attention`.
    """

    def __init__(self, *, num_heads: int, window_size: int) -> None:
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv, self.proj = Linear(), Linear()

    def __call__(self, attention: Any, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w, D) float to the same shape."""
        padding = _value_at_zero(attention.qkv, tokens) if self.window_size else None
        is_wrapped = not is_plain_linear(attention.qkv)
        with normed_again(tokens) if is_wrapped else nullcontext():
            qkv = self.qkv(attention.qkv, tokens)
        attended = rel_pos_attention(
            qkv,
            attention.rel_pos_h,
            attention.rel_pos_w,
            num_heads=self.num_heads,
            window_size=self.window_size,
            qkv_bias=padding,
        )
        return self.proj(attention.proj, attended)


class Int8Attend(Attend):
    """`Attend` with qkv, projection and global attention's `q k` in 8-bit integers, the rest in bfloat16 on a CPU that
    multiplies it; where neither layer is another than a plain one, and autograd is off.
    """

    def __init__(self, *, num_heads: int, window_size: int) -> None:
        super().__init__(num_heads=num_heads, window_size=window_size)
        self.int8_qkv, self.int8_proj = Int8Copy(), Int8Copy()

    def __call__(self, attention: Any, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w, D) float to the same shape."""
        qkv, proj = attention.qkv, attention.proj
        if not all(Int8Copy.is_supported(module, tokens) for module in (qkv, proj)):
            return super().__call__(attention, tokens)
        dtype = torch.bfloat16 if has_bfloat16() else tokens.dtype
        attended = rel_pos_attention(
            self.int8_qkv(qkv, tokens, dtype),
            attention.rel_pos_h.to(dtype),
            attention.rel_pos_w.to(dtype),
            num_heads=self.num_heads,
            window_size=self.window_size,
            qkv_bias=None if qkv.bias is None else qkv.bias.to(dtype),
            int8_scores=not self.window_size,
        )
        return self.int8_proj(proj, attended, tokens.dtype)


def _value_at_zero(qkv: Any, tokens: Tensor) -> Tensor | None:
    """The output of qkv for a padding token, which is zero: its bias, or more where the layer is wrapped."""
    if is_plain_linear(qkv):
        return qkv.bias
    return qkv(tokens.new_zeros(1, 1, 1, tokens.shape[-1])).flatten()


class Perceptron:
    """SAM's `lin2(gelu(lin1(x)))`, in the place of an MLP module.

    Packed copies stand for all of its modules where they may; else the MLP's own method computes.
    """

    def __init__(self, first: str, second: str) -> None:
        self.names = first, second
        self.first, self.second = PackedCopy(gelu=True), PackedCopy()
        self.frozen = FrozenCopy(self.first), FrozenCopy(self.second)

    def __call__(self, mlp: Any, x: Tensor) -> Tensor:
        """(..., D) float to the same shape."""
        first, second = (getattr(mlp, name) for name in self.names)
        if not all(_is_idle(part) for part in mlp.children()):
            return type(mlp).forward(mlp, x)
        if self.first.is_supported(first, x) and self.second.is_supported(second, x):
            return self._packed(first, second, x)
        widen, narrow = self.frozen
        if widen.is_supported(first, x) and narrow.is_supported(second, x):
            dtype = dtype_of_call(x)
            return frozen_mlp(x.to(dtype), widen.of(first, dtype), narrow.of(second, dtype))
        return type(mlp).forward(mlp, x)

    def _packed(self, first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
        rows = x.to(dtype_of_call(x)).flatten(0, -2)
        result = torch.empty_like(rows)
        for part, target in zip(rows.split(ROWS), result.split(ROWS), strict=True):
            target.copy_(self.second(second, self.first(first, part)))
        return result.view(x.shape)


class Int8Perceptron(Perceptron):
    """`Perceptron` in 8-bit integers, where its layers are plain ones and autograd is off."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first, second)
        self.int8_first, self.int8_second = Int8Copy(), Int8Copy()

    def __call__(self, mlp: Any, x: Tensor) -> Tensor:
        """(..., D) float to the same shape."""
        first, second = (getattr(mlp, name) for name in self.names)
        plain = all(Int8Copy.is_supported(module, x) for module in (first, second))
        if not (plain and all(_is_idle(part) for part in mlp.children())):
            return super().__call__(mlp, x)
        return int8_mlp(x, self.int8_first.of(first), self.int8_second.of(second))


def _is_idle(module: nn.Module) -> bool:
    """Whether nothing is lost where the module is not called: it has no hooks and drops nothing."""
    drops = isinstance(module, nn.Dropout) and module.training and module.p > 0
    return is_unhooked(module) and not drops


def mlp_replacement(path: str, mlp: Any, in_int8: bool) -> Iterator[Replacement]:
    """The replacement of an MLP; none for one that is another inside, which goes on as it is."""
    parts = dict(mlp.named_children())
    for first, second in LAYERS:
        idle = parts.keys() - {first, second, "act"}
        if {first, second, "act"} <= parts.keys() and not mlp._parameters and idle <= IDLE:
            does_nothing = all(isinstance(parts[name], nn.Identity | nn.Dropout) for name in idle)
            if does_nothing and _is_exact_gelu(parts["act"]):
                kind = Int8Perceptron if in_int8 else Perceptron
                yield Replacement(path, mlp, kind(first, second))


def _is_exact_gelu(activation: Any) -> bool:
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    # transformers' own module, which holds the function that it calls.
    is_theirs = type(activation).__name__ == "GELUActivation"
    return is_theirs and getattr(activation, "act", None) is F.gelu


def layer_norm_2d(norm: Any, x: Tensor) -> Tensor:
    """`LayerNorm2d.forward` of a neck on (B, C, h, w), whose channels lie side by side there."""
    # As there: under autocast the convolution's result is lower than the parameters.
    channels_last = x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, norm.weight.dtype))
    normed = F.layer_norm(channels_last, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return normed.permute(0, 3, 1, 2)
