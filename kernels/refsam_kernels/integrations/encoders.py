"""SAM's image encoder wherever it stands: its blocks are found by their structure, in the ways in which libraries write them.

A block is a module with an attention whose members are `qkv`, `proj`, `rel_pos_h` and `rel_pos_w`. Its own method goes on to
compute it, but finds a `window_size` of 0, so that it hands its attention the whole grid: no block is written again here.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from refsam_kernels.integrations.modules import (
    Attend,
    Int8Attend,
    layer_norm_2d,
    mlp_replacement,
    wrapped_linear_replacements,
)
from refsam_kernels.integrations.replacement import Replacement, loading_reasons, members_of

ATTENTION = {"qkv", "proj", "rel_pos_h", "rel_pos_w"}
# They may stand beside: modules that are idle, or run between the operator and the block.
BESIDE = {"q_norm", "k_norm", "attn_drop", "proj_drop"}
POOLS = ("pool_q", "pool_k", "pool_v")
# An attention that has qkv and one of these is meant to be one of SAM's, or is another that looks like it.
SIGNS = ("rel_pos_h", "rel_pos", "use_rel_pos", "use_relative_position_embeddings")


@dataclass(frozen=True)
class Kind:
    """One way of writing SAM's block.

    `attention` and `members` name the block's sub-modules, `beside` those that some of its libraries add. `attend` is called in
    the place of the attention's method, `compute` calls a block on tokens (B, h, w, D) and gives the same shape. `layout` names
    torch's memory format in which a token's channels lie side by side.
    """

    attention: str
    members: frozenset[str]
    attend: Callable[..., Any]
    compute: Callable[[Any, Tensor], Tensor]
    heads: str = "num_heads"
    beside: frozenset[str] = frozenset()
    block_takes: tuple[str, ...] = ()
    layout: str = "contiguous_format"
    attention_takes: tuple[str, ...] = ("x",)


def _plain(attend: Attend, attention: Any, x: Tensor) -> Tensor:
    """segment-anything's `Attention.forward` and its copies'; timm's, whose projection is dropped out."""
    attended = attend(attention, x)
    return attention.proj_drop(attended) if hasattr(attention, "proj_drop") else attended


def _pair(
    attend: Attend, attention: Any, hidden_states: Tensor, output_attentions: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """transformers' `SamVisionAttention.forward` and its copies'; weights are made where they are asked for."""
    if are_weights_wanted(output_attentions):
        say_that_weights_are_made(type(attention).__name__)
        return type(attention).forward(attention, hidden_states, output_attentions)
    return attend(attention, hidden_states), None


def _single(
    attend: Attend, attention: Any, hidden_state: Tensor, output_attentions: bool = False
) -> tuple[Tensor | None, ...]:
    """transformers' `VitDetAttention.forward`, which leaves weights out where they are not asked for."""
    return _pair(attend, attention, hidden_state, output_attentions)[: 1 + bool(output_attentions)]


def _of_vitdet(block: Any, tokens: Tensor) -> Tensor:
    return block(tokens.permute(0, 3, 1, 2))[0].permute(0, 2, 3, 1)


def _of_seggpt(block: Any, tokens: Tensor) -> Tensor:
    return block(tokens, ensemble_cond=1)[0]


KINDS = (
    Kind(  # segment-anything, detectron2, timm
        attention="attn",
        members=frozenset({"norm1", "attn", "norm2", "mlp"}),
        beside=frozenset(
            {"drop_path", "residual", "ls1", "drop_path1", "ls2", "drop_path2"}
        ),
        attend=_plain,
        compute=lambda block, tokens: block(tokens),
        block_takes=("x",),
    ),
    Kind(  # transformers' SamVisionLayer
        attention="attn",
        members=frozenset({"layer_norm1", "attn", "layer_norm2", "mlp"}),
        attend=_pair,
        compute=lambda block, tokens: block(tokens),
        heads="num_attention_heads",
        block_takes=("hidden_states",),
        attention_takes=("hidden_states", "output_attentions"),
    ),
    Kind(  # transformers' VitDetLayer
        attention="attention",
        members=frozenset({"norm1", "attention", "norm2", "mlp", "drop_path"}),
        beside=frozenset({"residual"}),
        attend=_single,
        compute=_of_vitdet,
        block_takes=("hidden_states", "output_attentions"),
        layout="channels_last",
        attention_takes=("hidden_state", "output_attentions"),
    ),
    Kind(  # transformers' SegGptLayer
        attention="attention",
        members=frozenset({"layernorm_before", "attention", "layernorm_after", "mlp", "drop_path"}),
        attend=_pair,
        compute=_of_seggpt,
        heads="num_attention_heads",
        attention_takes=("hidden_states", "output_attentions"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A block that was found in a model, and the way in which it is written."""

    path: str
    module: Any
    kind: Kind

    @property
    def attention(self) -> Any:
        """The block's attention."""
        return getattr(self.module, self.kind.attention)

    @property
    def window_size(self) -> int:
        """Side of its windows; 0 where it attends globally."""
        return getattr(self.module, "window_size", 0)

    @property
    def likeness(self) -> tuple[object, ...]:
        """Equal for blocks that compute the same but for their weights."""
        return (self.window_size, *map(type, self.module.modules()))

    def reasons(self) -> Iterator[str]:
        """Why the block cannot be replaced, in words, the first thing that differs first."""
        found, wanted = members_of(self.module), self.kind.members
        if not wanted <= found <= wanted | self.kind.beside:
            yield f"{self.path}: got members {sorted(found)}, wanted {sorted(wanted)}"
            return
        path = f"{self.path}.{self.kind.attention}"
        yield from attention_reasons(path, self.attention, self.kind.heads)
        if not isinstance(self.window_size, int) or self.window_size < 0:
            yield f"{self.path}.window_size: got {self.window_size!r}, wanted one number, 0 or more"
        yield from loading_reasons(self.path, self.module)

    def replacements(self, in_int8: bool = False) -> Iterator[Replacement]:
        """The methods to replace; linear layers may be computed in 8-bit integers."""
        kind, attention, path = self.kind, self.attention, f"{self.path}.{self.kind.attention}"
        if kind.block_takes:
            whole = partial(on_whole_grid, kind.layout)
            yield Replacement(self.path, self.module, whole, parameters=kind.block_takes)
        make = Int8Attend if in_int8 else Attend
        attend = make(num_heads=getattr(attention, kind.heads), window_size=self.window_size)
        takes = kind.attention_takes
        yield Replacement(path, attention, partial(kind.attend, attend), parameters=takes)
        yield from mlp_replacement(f"{self.path}.mlp", self.module.mlp, in_int8)
        for owner in (kind.attention, "mlp"):
            for name, layer in getattr(self.module, owner).named_children():
                yield from wrapped_linear_replacements(f"{self.path}.{owner}.{name}", layer)


def find_blocks(model: nn.Module, path: str = "model") -> list[Block]:
    """All modules with an attention that is SAM's or resembles it; `Block.reasons` tells which. In the model's order."""
    found = []
    for name, module in model.named_modules():
        for child, attention in module.named_children():
            if hasattr(attention, "qkv") and any(hasattr(attention, sign) for sign in SIGNS):
                where = f"{path}.{name}" if name else path
                found.append(Block(where, module, _kind_of(module, child, attention)))
    return found


def _kind_of(block: nn.Module, child: str, attention: nn.Module) -> Kind:
    """The first kind that fits, or that fits best: its members, then what the attention's method takes."""
    takes = tuple(inspect.signature(type(attention).forward).parameters)[1:]
    found = members_of(block)

    def likeness(kind: Kind) -> tuple[bool, bool, int]:
        return kind.members <= found, kind.attention_takes == takes, len(kind.members & found)

    return max(
        (kind for kind in KINDS if kind.attention == child),
        key=likeness,
        default=KINDS[0],
    )


def norm_replacements(model: nn.Module, path: str = "model") -> Iterator[Replacement]:
    """The norms of SAM's necks, as segment-anything and its copies write them."""
    for name, module in model.named_modules():
        above, _, _ = name.rpartition(".")
        is_named = type(module).__name__ == "LayerNorm2d" and not isinstance(module, nn.LayerNorm)
        is_norm = is_named and members_of(module) == {"weight", "bias"}
        if is_norm and above.rpartition(".")[2] == "neck":
            yield Replacement(f"{path}.{name}", module, layer_norm_2d, parameters=("x",))


def attention_reasons(path: str, attention: Any, heads: str) -> Iterator[str]:
    """Why `Attend` cannot stand for an attention."""
    for sign in ("use_rel_pos", "use_relative_position_embeddings"):
        if not getattr(attention, sign, True):
            yield f"{path}.{sign}: got False, wanted True"
            return
    pooled = [name for name in POOLS if getattr(attention, name, None) is not None]
    if pooled:
        yield f"{path}: got pooled queries or keys ({', '.join(pooled)}), wanted as many as tokens"
        return
    name = type(attention).__name__
    if not hasattr(attention, "rel_pos_h"):
        kind = type(attention.rel_pos).__name__
        yield f"{path}: got a {name} with positions of another kind, rel_pos (a {kind}); wanted rel_pos_h and rel_pos_w"
        return
    found = members_of(attention)
    if not ATTENTION <= found <= ATTENTION | BESIDE:
        yield f"{path}: got members {sorted(found)}, wanted {sorted(ATTENTION)}"
        return
    yield from _value_reasons(path, attention, heads)


def _value_reasons(path: str, attention: Any, heads: str) -> Iterator[str]:
    """Why an attention of the right structure computes something else."""
    if not hasattr(attention, heads):
        yield f"{path}: got no {heads}, wanted the number of heads"
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, nn.Identity())
        if type(norm) is not nn.Identity:
            yield f"{path}.{name}: got a {type(norm).__name__}, wanted qk_norm=False"
    for name in ("dropout", "attn_drop"):
        share = getattr(attention, name, 0.0)
        share = getattr(share, "p", share)
        if share:
            yield f"{path}.{name}: got {share}, wanted 0: attention's weights are never made"
    head_dim = attention.rel_pos_h.shape[1]
    scale = getattr(attention, "scale", head_dim**-0.5)
    if abs(scale - head_dim**-0.5) > 1e-6:
        yield f"{path}.scale: got {scale}, wanted {head_dim} ** -0.5"


def on_whole_grid(layout: str, block: Any, *args: Any, **kwargs: Any) -> Any:
    """A block's own method, its attention being handed the grid; tokens and their gradients lie in torch's format `layout`.

    Convolutions before and behind the blocks use another layout, which the sums of residuals would keep in all blocks. The
    format's name is kept, since `torch.save` cannot pickle the format itself.
    """
    asked = kwargs.get("output_attentions", args[1] if len(args) > 1 else False)
    if are_weights_wanted(asked):  # they are those of windows
        return type(block).forward(block, *args, **kwargs)
    contiguous = partial(torch.Tensor.contiguous, memory_format=getattr(torch, layout))
    args = (*map(contiguous, args[:1]), *args[1:])
    result = unwindowed(block, *args, **kwargs)
    features = result if isinstance(result, Tensor) else result[0]
    if features.requires_grad and not torch.compiler.is_compiling():
        features.register_hook(contiguous)
    return result


def unwindowed(block: Any, *args: Any, **kwargs: Any) -> Any:
    """A block's own method, for which its windows have no size."""
    if torch.compiler.is_compiling() and not _drops_windows(block):
        # Dynamo before torch 2.13 cannot follow the making of a twin.
        size, block.window_size = block.window_size, 0
        result = type(block).forward(block, *args, **kwargs)
        block.window_size = size
        return result
    return type(block).forward(_without_windows(block), *args, **kwargs)


def _drops_windows(block: Any) -> bool:
    return block.training and block.window_size and hasattr(block, "drop_path1")


def _without_windows(block: Any) -> Any:
    """The block, with the same sub-modules and hooks, and a `window_size` of 0."""
    twin = object.__new__(type(block))
    twin.__dict__.update(block.__dict__)
    twin.__dict__["window_size"] = 0
    if _drops_windows(block):
        twin.__dict__["drop_path1"] = partial(_drop_windows, block)
    return twin


def _drop_windows(block: Any, attended: Tensor) -> Tensor:
    """`drop_path1` of timm's block on (B, h, w, D); timm drops whole windows, which are its images there."""
    if type(block.drop_path1) is nn.Identity:
        return attended
    images, height, width, _ = attended.shape
    size = block.window_size
    rows, columns = -(-height // size), -(-width // size)
    shares = block.drop_path1(attended.new_ones(images * rows * columns, 1, 1, 1))
    shares = shares.view(images, rows, columns, 1)
    return (
        attended * shares.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :height, :width]
    )


def are_weights_wanted(asked: bool | None, name: str = "attentions") -> bool:
    """Whether attention's weights are asked for, by argument or, as transformers' encoders do it, for all that runs now."""
    if asked or torch.compiler.is_compiling():
        return bool(asked)
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    return name in ((collector.get() or ()) if collector else ())


@cache
def say_that_weights_are_made(class_name: str) -> None:
    """Warns, once for each class, that its own code computes."""
    warnings.warn(
        f"output_attentions=True: {class_name} computes by its own code, which makes the weights; leave it out to be faster",
        stacklevel=3,
    )
