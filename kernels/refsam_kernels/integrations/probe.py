"""Compares a block before and after its methods are replaced, on random tokens and without touching the model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from refsam_kernels.integrations.encoders import Block
from refsam_kernels.integrations.replacement import Optimization
from refsam_kernels.packed_linear import is_plain_linear

# Of the largest value. Rounding is a hundred times smaller; another formula differs by more.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def probe_reasons(block: Block) -> Iterator[str]:
    """Why the block's replacement does not compute the same as the block."""
    twin = Block(block.path, _twin(block.module), block.kind)
    _randomise(twin.attention)
    tokens = _tokens(block)
    try:
        wanted = block.kind.compute(twin.module, tokens)
    except Exception as error:  # whatever the foreign code raises
        yield (
            f"{block.path}: its own code fails on random tokens {tuple(tokens.shape)}: {error} "
            "(check=False leaves this check out)"
        )
        return
    with Optimization(list(twin.replacements())):
        try:
            found = block.kind.compute(twin.module, tokens)
        except Exception as error:  # of a structure that only looks like SAM's
            yield f"{block.path}: computes something else than SAM's block: {error}"
            return
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if found.shape != wanted.shape or not difference <= TOLERANCES.get(tokens.dtype, 5e-2):
        yield (
            f"{block.path}: computes something else than SAM's block: on random tokens its result differs by {difference:.1e} of "
            "the largest value"
        )


def _twin(module: nn.Module) -> Any:
    """The module and its sub-modules without hooks and dropout; their parameters are shared."""
    twin = type(module).__new__(type(module))
    state = vars(twin)
    state.update(vars(module))
    hooks = [name for name in state if name.endswith("_hooks") and isinstance(state[name], dict)]
    state.update((name, type(state[name])()) for name in hooks)
    state.update(training=False, _parameters=dict(module._parameters))
    children = module._modules.items()
    state["_modules"] = {name: child and _twin(child) for name, child in children}
    return twin


def _randomise(attention: Any) -> None:
    """Gives a twin weights of its own, so that its positions count even where they are still zero."""
    table, generator = attention.rel_pos_h, torch.Generator().manual_seed(0)

    def normal(like: Tensor, width: int) -> nn.Parameter:
        values = torch.randn(like.shape, generator=generator) * width**-0.5
        return nn.Parameter(values.to(like), requires_grad=False)

    for name in ("rel_pos_h", "rel_pos_w"):
        attention._parameters[name] = normal(attention._parameters[name], table.shape[1])
    for layer in (attention.qkv, attention.proj):
        if is_plain_linear(layer):
            width = layer.in_features
            given = {name: each for name, each in layer._parameters.items() if each is not None}
            layer._parameters.update((name, normal(each, width)) for name, each in given.items())


def _tokens(block: Block) -> Tensor:
    """A few random tokens (1, h, w, D); more than a window has a side, so that there is padding."""
    table, attention = block.attention.rel_pos_h, block.attention
    height, width = (block.window_size or 4) + 1, (block.window_size or 4) + 2
    shape = (1, height, width, table.shape[1] * getattr(attention, block.kind.heads))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(table)
