"""Compares a block or a mask decoder before and after its methods are replaced, on random numbers; the model is not touched."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refsam_kernels.integrations.encoders import Block
from refsam_kernels.integrations.replacement import Optimization, Replacement
from refsam_kernels.packed_linear import is_plain_linear

# Relative to the largest value. Rounding is a hundred times smaller; another formula differs by more.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Where the dtype is not listed, or layers are quantised: a value that is rounded the other way differs by a whole step.
COARSE = 5e-2


def block_reasons(block: Block) -> Iterator[str]:
    """Why a block's replacement does not compute the same as the block."""
    twin = Block(block.path, _twin(block.module), block.kind)
    _randomise(twin.attention)
    tokens = _tokens(block)
    compute = partial(block.kind.compute, twin.module, tokens)
    replacements = lambda: list(twin.replacements())  # noqa: E731
    quantised = _is_quantised(block.module)
    yield from _differences(block.path, "SAM's block", compute, replacements, quantised)


def decoder_reasons(
    path: str,
    decoder: Any,
    example: Callable[[Any, Callable[..., Tensor]], Tensor],
    replacements: Callable[[Any, str], list[Replacement]],
) -> Iterator[str]:
    """Why a mask decoder's replacement does not compute the same; `example` calls it on what a generator of tensors gives."""
    twin, generator = _twin(decoder), torch.Generator().manual_seed(1)
    like = decoder.mask_tokens.weight

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    def compute() -> Tensor:
        generator.manual_seed(1)
        return example(twin, normal)

    yield from _differences(path, "SAM's mask decoder", compute, lambda: replacements(twin, path))


def _differences(
    path: str,
    what: str,
    compute: Callable[[], Tensor],
    replacements: Callable[[], list[Replacement]],
    is_quantised: bool = False,
) -> Iterator[str]:
    """Why the result is another one while the methods are replaced."""
    try:
        wanted = compute()
    except Exception as error:  # whatever the foreign code raises
        yield (
            f"{path}: its own code fails on random numbers: {error} (check=False leaves this check out)"
        )
        return
    with Optimization(replacements()):
        try:
            found = compute()
        except Exception as error:  # of a structure that only looks like SAM's
            yield f"{path}: computes something else than {what}: {error}"
            return
    difference = float("inf")
    if found.shape == wanted.shape:
        difference = float((found - wanted).abs().max() / wanted.abs().max())
    tolerance = COARSE if is_quantised else TOLERANCES.get(wanted.dtype, COARSE)
    if not difference <= tolerance:
        yield (
            f"{path}: computes something else than {what}: on random numbers its result differs by {difference:.1e} of the "
            "largest value"
        )


def _is_quantised(module: nn.Module) -> bool:
    """Whether there are weights of few bits, or tensors of another class that may hold such."""
    return any(
        type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point()
        for weight in module.parameters()
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
