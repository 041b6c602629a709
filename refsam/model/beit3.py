"""BEiT-3: one transformer over the patches of a small image and the words of an expression.

Every weight exists twice: ``A`` for patches, ``B`` for words. Only the attention mixes the two. Parameter names are
torchscale's, which EVF-SAM's checkpoints use. The model and its traps are described by EVF-SAM
(arXiv 2406.20076), ``model/unilm/beit3``, and torchscale 0.2.0.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.model.packing import PackedModule
from refsam_kernels import PackedLinear, can_prepack

EPS = 1e-5
FIRST_POSITION = 2  # rows 0 and 1 of the position tables are never read
Layer = Callable[[Tensor], Tensor]
# Linear layers as one, their results side by side, followed by a GELU where True.
ArrangeLinear = Callable[[Sequence[nn.Linear], bool], Layer]
ArrangeNorm = Callable[[nn.LayerNorm], Layer]


class Branch(NamedTuple):
    """One modality's half of a layer, as functions of (..., D)."""

    norm1: Layer
    qkv: Layer  # to (..., 3 D): queries, keys, values
    inner_norm: Layer
    out: Layer
    norm2: Layer
    expand: Layer  # with its GELU, to (..., F)
    ffn_norm: Layer
    contract: Layer


class State(NamedTuple):
    """Tokens between two layers: patches (P, V, D) with the class token first, words (P, T, D)."""

    patches: Tensor
    words: Tensor


def both(make: Callable[[], nn.Module]) -> Any:
    """The copies for patches and for words."""
    return nn.ModuleDict({"A": make(), "B": make()})


class FeedForward(nn.Module):
    """Parameters of a feed-forward half with a norm over its hidden width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=EPS)


class SelfAttention(nn.Module):
    """Parameters of an attention whose result is normed before the output projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            both(lambda: nn.Linear(width, width)) for _ in range(4)
        )
        self.inner_attn_ln = both(lambda: nn.LayerNorm(width, eps=EPS))


class Beit3Layer(nn.Module):
    """Parameters of one layer, patches' and words' copies."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width)
        self.self_attn_layer_norm = both(lambda: nn.LayerNorm(width, eps=EPS))
        self.ffn = both(lambda: FeedForward(width, hidden))
        self.final_layer_norm = both(lambda: nn.LayerNorm(width, eps=EPS))

    def branches(self, linear: ArrangeLinear, norm: ArrangeNorm) -> tuple[Branch, Branch]:
        """The patches' and the words' functions, made of the parameters by `linear` and `norm`."""
        attention: Any = self.self_attn

        def branch(copy: str) -> Branch:
            ffn: Any = self.ffn[copy]
            return Branch(
                norm(self.self_attn_layer_norm[copy]),
                linear([getattr(attention, f"{name}_proj")[copy] for name in "qkv"], False),
                norm(attention.inner_attn_ln[copy]),
                linear([attention.out_proj[copy]], False),
                norm(self.final_layer_norm[copy]),
                linear([ffn.fc1], True),
                norm(ffn.ffn_layernorm),
                linear([ffn.fc2], False),
            )

        return branch("A"), branch("B")


class PatchEmbedding(nn.Module):
    """A class token and the patches of a square image."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, s, s) to (B, 1 + patches, D)."""
        patches = self.proj(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)


class Encoder(nn.Module):
    """Position tables, layers and last norm, named as in torchscale."""

    def __init__(self, width: int, depth: int, hidden: int, patches: int, positions: int) -> None:
        super().__init__()
        tables = {"A": FIRST_POSITION + patches, "B": positions}
        self.embed_positions: Any = nn.ModuleDict(
            {copy: nn.Embedding(rows, width) for copy, rows in tables.items()}
        )
        self.layers = nn.ModuleList(Beit3Layer(width, hidden) for _ in range(depth))
        self.layer_norm = both(lambda: nn.LayerNorm(width, eps=EPS))


class BEiT3(PackedModule):
    """BEiT-3's class token of a frame and an expression.

    Words attend to patches and patches to words from the first layer on. So a frame's own part, shared by its
    expressions, ends with the first layer's queries, keys and values.

    Args:
        width: D, a multiple of num_heads.
        depth: number of layers.
        num_heads: number of attention heads.
        hidden: F, the feed-forward width.
        image_size: side s of the image in pixels, a multiple of patch_size. No other size fits the position table.
        patch_size: in pixels.
        vocabulary_size: number of rows of the word table.
        positions: number of rows of the words' position table; two are never used.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        image_size: int,
        patch_size: int,
        vocabulary_size: int,
        positions: int,
    ) -> None:
        super().__init__()
        self.num_heads, self.max_tokens = num_heads, positions - FIRST_POSITION
        self.text_embed = nn.Embedding(vocabulary_size, width)
        self.vision_embed = PatchEmbedding(width, patch_size)
        patches = 1 + (image_size // patch_size) ** 2
        self.encoder = Encoder(width, depth, hidden, patches, positions)

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """(B, 3, s, s) in -1..1 to patches with their positions (B, V, D)."""
        positions = self.encoder.embed_positions["A"].weight[FIRST_POSITION:]
        return self.vision_embed(pixels) + positions

    def embed_words(self, ids: Tensor) -> Tensor:
        """Token ids (P, T) int64 to words with their positions (P, T, D)."""
        positions = self.encoder.embed_positions["B"].weight[FIRST_POSITION:]
        return self.text_embed(ids) + positions[: ids.shape[1]]

    def forward(
        self, patches: Tensor, words: Tensor, lengths: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """The class token (P, D) of each expression in its frame.

        patches (B, V, D) and words (P, T, D) come from `embed_patches` and `embed_words`; the first lengths (P,) int64
        words are attended to. image_index (P,) int64 names each expression's frame; None: all are of the only one.
        """
        layers = self.layers()
        is_key = key_mask(patches.shape[1], words.shape[1], lengths)
        own: Tensor | None = layers[0][0].qkv(layers[0][0].norm1(patches))
        assert own is not None
        if image_index is None:
            patches, own = (x.expand(words.shape[0], -1, -1) for x in (patches, own))
        else:
            patches, own = patches[image_index], own[image_index]
        state = State(patches, words)
        for index, layer in enumerate(layers):
            is_last = index == len(layers) - 1
            state = self.run_layer(layer, state, is_key, own, queries=1 if is_last else None)
            own = None
        return self.encoder.layer_norm["A"](state.patches[:, 0])

    def run_layer(
        self,
        layer: tuple[Branch, Branch],
        state: State,
        is_key: Tensor,
        own: Tensor | None = None,
        queries: int | None = None,
    ) -> State:
        """One layer.

        own: the patches' queries, keys and values (P, V, 3 D) where they are known. queries: compute only so many
        first patches and no words (None: all), which serves the last layer.
        """
        branches = [(layer[0], state.patches, own), (layer[1], state.words, None)]
        qkv = [b.qkv(b.norm1(x)) if known is None else known for b, x, known in branches]
        attended = self._attend(torch.cat(qkv, dim=1), is_key, queries)
        if queries is not None:
            return State(_rest(layer[0], state.patches[:, :queries], attended), state.words)
        count = state.patches.shape[1]
        parts = attended[:, :count], attended[:, count:]
        return State(*(_rest(b, x, y) for (b, x, _), y in zip(branches, parts, strict=True)))

    def _attend(self, qkv: Tensor, is_key: Tensor, queries: int | None) -> Tensor:
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        attended = F.scaled_dot_product_attention(q[:, :, :queries], k, v, attn_mask=is_key)
        return attended.transpose(1, 2).flatten(2)

    @staticmethod
    def arrange(part: Beit3Layer, dtype: torch.dtype) -> tuple[Branch, Branch]:
        """A layer's branches with products in this dtype; sums and norms stay in the weights' own."""
        return part.branches(partial(_packed_linear, dtype), partial(_cast_norm, dtype))

    def layers(self) -> list[tuple[Branch, Branch]]:
        """Each layer's branches for patches and for words, packed after `optimize` where autograd is off."""
        layers: list[Any] = [*self.encoder.layers]
        packing = self.usable_packing
        if packing is None:
            return [layer.branches(_plain_linear, lambda norm: norm) for layer in layers]
        return packing.arranged(layers, packing.dtype_of(self.text_embed.weight))


def key_mask(patches: int, words: int, lengths: Tensor) -> Tensor:
    """Attention mask (P, 1, 1, V + T) bool over V + T tokens, True for valid ones."""
    index = torch.arange(patches + words, device=lengths.device)
    return (index < patches + lengths[:, None])[:, None, None]


def _plain_linear(modules: Sequence[nn.Linear], gelu: bool) -> Layer:
    if gelu:
        return lambda x: F.gelu(modules[0](x))
    return lambda x: torch.cat([module(x) for module in modules], dim=-1)


def _packed_linear(dtype: torch.dtype, modules: Sequence[nn.Linear], gelu: bool) -> Layer:
    weight = torch.cat([module.weight for module in modules]).to(dtype)
    bias = torch.cat([module.bias for module in modules]).to(dtype)
    if can_prepack(weight):
        return PackedLinear(weight, bias, gelu=gelu)
    return lambda x: F.gelu(F.linear(x, weight, bias)) if gelu else F.linear(x, weight, bias)


def _cast_norm(dtype: torch.dtype, module: nn.LayerNorm) -> Layer:
    weight, bias = module.weight, module.bias
    return lambda x: F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, EPS).to(dtype)


def _rest(branch: Branch, x: Tensor, attended: Tensor) -> Tensor:
    """The layer behind its attention."""
    x = x + branch.out(branch.inner_norm(attended))
    return x + branch.contract(branch.ffn_norm(branch.expand(branch.norm2(x))))
