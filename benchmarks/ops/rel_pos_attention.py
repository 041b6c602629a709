"""SAM's attention, global and in windows, against alternatives: SDPA with a bias tensor, FlexAttention, augmented q and k.

The bias is an exact product of few channels (see `refsam_kernels.rel_pos_attention.augmented`), so attention without a bias on
augmented queries and keys computes it too: SDPA's, or xformers'. SDPA without any bias, on windows that are cut and padded before
the clock starts, is the ceiling. Making the bias, and cutting into windows, is part of the other ways' time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._eager import bound, exactly, further_than, random_gradients, run
from benchmarks.registry import Workload, backends_of, register, unusable
from refsam_kernels import rel_pos_attention
from refsam_kernels.rel_pos_attention import reference

OPERATOR = "rel_pos_attention"
BASELINE, GIVEN = "SDPA with bias", "SDPA, bias given"


@dataclass(frozen=True)
class Setting:
    """Attention of one block of a SAM encoder at 1024 x 1024: one image on a CPU, four on a GPU."""

    name: str
    heads: int
    head_dim: int
    window: int  # 0: global
    trains: bool = False
    grid: int = 64
    dtype: torch.dtype | None = None  # None: float32 on a CPU, bfloat16 on a GPU

    def inputs(self, device: str) -> dict[str, Tensor]:
        """Random tensors of the size that they have in SAM's checkpoints."""
        normal = partial(
            torch.randn, generator=torch.Generator(device).manual_seed(42), device=device
        )
        side, width = self.window or self.grid, 3 * self.heads * self.head_dim
        shapes = {
            "qkv": (4 if device == "cuda" else 1, self.grid, self.grid, width),
            "rel_pos_h": (2 * side - 1, self.head_dim),
            "rel_pos_w": (2 * side - 1, self.head_dim),
            "qkv_bias": (width,),
        }
        dtype = self.dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
        return {
            name: ((0.3 if "rel" in name else 1.0) * normal(shape))
            .to(dtype)
            .requires_grad_(self.trains)
            for name, shape in shapes.items()
        }


def cut(qkv: Tensor, qkv_bias: Tensor | None, setting: Setting) -> tuple[Tensor, ...]:
    """q, k, v of all windows, each (windows, heads, tokens, head_dim)."""
    side = setting.window or setting.grid
    windows, _, _ = reference.partition(reference.pad(qkv, qkv_bias, side, side), side, side)
    split = windows.flatten(1, 2).unflatten(-1, (3, setting.heads, setting.head_dim))
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def join(attended: Tensor, setting: Setting) -> Tensor:
    """(windows, heads, tokens, head_dim) laid out in the grid: (B, h, w, D)."""
    side = setting.window or setting.grid
    windows = attended.transpose(1, 2).flatten(2).unflatten(1, (side, side))
    count = -(-setting.grid // side)
    grid = reference.unpartition(windows, count, count)
    return grid[:, : setting.grid, : setting.grid].contiguous()


def relative_terms(
    q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Products of the queries with the tables: both (windows, heads, tokens, side)."""
    grid = q.unflatten(2, (side, side))
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, reference.relative(rel_pos_h))
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, reference.relative(rel_pos_w))
    return rel_h.flatten(2, 3), rel_w.flatten(2, 3)


def sdpa_with_bias(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, *, setting: Setting
) -> Tensor:
    """As transformers has it: the N x N bias is made, then given to scaled_dot_product_attention."""
    q, k, v = cut(qkv, qkv_bias, setting)
    rel_h, rel_w = relative_terms(q, rel_pos_h, rel_pos_w, setting.window or setting.grid)
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    return join(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), setting)


def flex_attention(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, *, setting: Setting
) -> Tensor:
    """FlexAttention with the relative terms as captured tensors, whose gradients it gives too."""
    q, k, v = (tensor.contiguous() for tensor in cut(qkv, qkv_bias, setting))
    side = setting.window or setting.grid
    rel_h, rel_w = relative_terms(q, rel_pos_h, rel_pos_w, side)

    def add_terms(score: Tensor, b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + rel_h[b, n, i, j // side] + rel_w[b, n, i, j % side]

    return join(compiled_flex_attention()(q, k, v, score_mod=add_terms), setting)


@cache
def compiled_flex_attention() -> Callable[..., Any]:
    """It makes the N x N scores unless it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention as attend

    return torch.compile(attend, dynamic=False)


def augmented_operands(
    q: Tensor, k: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys (windows, heads, tokens, head_dim + 2 side) whose scaled products are the logits with their bias."""
    rows, columns = torch.eye(side).to(k).repeat_interleave(side, 0), torch.eye(side).to(k)
    places = torch.cat([rows, columns.repeat(side, 1)], -1).expand(*k.shape[:2], -1, -1)
    terms = (term * q.shape[-1] ** 0.5 for term in relative_terms(q, rel_pos_h, rel_pos_w, side))
    return torch.cat([q, *terms], -1), torch.cat([k, places], -1)


def augmented_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    qkv_bias: Tensor,
    *,
    setting: Setting,
    attend: Callable[..., Tensor],
) -> Tensor:
    """`attend(queries, keys, values, scale=)`, which takes no bias, on augmented queries and keys."""
    q, k, v = cut(qkv, qkv_bias, setting)
    queries, keys = augmented_operands(q, k, rel_pos_h, rel_pos_w, setting.window or setting.grid)
    return join(attend(queries, keys, v, scale=q.shape[-1] ** -0.5), setting)


def xformers_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """xformers' memory-efficient attention, which wants heads behind tokens."""
    from xformers.ops import memory_efficient_attention

    tensors = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
    return memory_efficient_attention(*tensors, scale=scale).transpose(1, 2)


def peers(setting: Setting) -> dict[str, Callable[..., Tensor]]:
    """The alternatives that run here, without the baseline."""
    augmented = partial(augmented_attention, setting=setting)
    return {
        "FlexAttention": partial(flex_attention, setting=setting),
        "augmented q and k, SDPA": partial(augmented, attend=F.scaled_dot_product_attention),
        "augmented q and k, xformers": partial(augmented, attend=xformers_attention),
    }


def workload(device: str, *, setting: Setting, with_peers: bool = True) -> Workload:
    """All ways on the same inputs, checked against float64."""
    inputs = setting.inputs(device)
    attend: Any = partial(rel_pos_attention, num_heads=setting.heads, window_size=setting.window)
    ways: dict[str, Callable[..., Tensor]] = {BASELINE: partial(sdpa_with_bias, setting=setting)}
    grads = random_gradients(ways[BASELINE], inputs)
    skipped: dict[str, str] = {}
    for name, way in peers(setting).items() if with_peers else ():
        if reason := unusable(partial(run, way, inputs, grads)):
            skipped[name] = reason
        else:
            ways[name] = way
    ways |= {name: partial(attend, backend=name) for name in backends_of(OPERATOR, device)}
    in_float64 = {name: exactly(tensor) for name, tensor in inputs.items()}
    exact = run(partial(attend, backend="fallback"), in_float64, list(map(exactly, grads)))
    plain, dtype = run(ways[BASELINE], inputs, grads), inputs["qkv"].dtype
    bounds = [bound(*pair, dtype) for pair in zip(plain, exact, strict=True)]
    with torch.no_grad():
        q, k, v = (x.contiguous() for x in cut(inputs["qkv"], inputs["qkv_bias"], setting))
    apart = {
        name: x.requires_grad_(setting.trains) for name, x in zip("qkv", (q, k, v), strict=True)
    }
    unbiased = partial(run, lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    pairs = q.shape[0] * setting.heads * q.shape[2] ** 2
    flops = 4 * setting.head_dim * pairs
    return Workload(
        providers={name: partial(run, way, inputs, grads) for name, way in ways.items()},
        wrong=partial(further_than, exact=exact, bounds=bounds),
        moved_bytes=sum(tensor.nbytes for tensor in (*inputs.values(), *grads)),
        flops=7 * flops // 2 if setting.trains else flops,
        shapes={"qkv": list(inputs["qkv"].shape), "dtype": str(dtype)},
        ceilings={"SDPA without bias": partial(unbiased, apart, [torch.randn_like(q)])},
        dtype=dtype,
        skipped=skipped,
    )


@torch.no_grad()
def against_given_bias(device: str, *, setting: Setting) -> Workload:
    """Global attention against SDPA that does less: its N x N bias, q, k and v are made before the clock starts."""
    inputs, side = setting.inputs(device), setting.grid
    attend: Any = partial(rel_pos_attention, num_heads=setting.heads)
    q, k, v = (x.contiguous() for x in cut(inputs["qkv"], inputs["qkv_bias"], setting))
    rel_h, rel_w = relative_terms(q, inputs["rel_pos_h"], inputs["rel_pos_w"], side)
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    attended = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=bias)

    def baseline() -> tuple[Tensor]:
        return (attended().transpose(1, 2).flatten(2).unflatten(1, (side, side)),)

    ways = {name: partial(attend, backend=name) for name in backends_of(OPERATOR, device)}
    in_float64 = {name: exactly(tensor) for name, tensor in inputs.items()}
    exact = (attend(**in_float64, backend="fallback"),)
    return Workload(
        providers={GIVEN: baseline}
        | {name: partial(run, way, inputs, exact) for name, way in ways.items()},
        wrong=partial(further_than, exact=exact, bounds=[bound(*baseline(), *exact, q.dtype)]),
        moved_bytes=sum(tensor.nbytes for tensor in inputs.values()) + q.nbytes,
        flops=4 * setting.heads * setting.head_dim * side**4,
        shapes={"qkv": list(inputs["qkv"].shape), "dtype": str(q.dtype)},
        dtype=q.dtype,
    )


for model, heads, head_dim in (("ViT-B", 12, 64), ("ViT-H", 16, 80)):
    for kind, window in (("global", 0), ("windows", 14)):
        for trains in (False, True):
            name = f"{model} {kind}{', trained' if trains else ''}"
            case = Setting(name, heads, head_dim, window, trains)
            register(OPERATOR, name, baseline=BASELINE)(partial(workload, setting=case))

for dtype in (torch.float32, torch.bfloat16):
    name = f"ViT-B global, bias given, {str(dtype).removeprefix('torch.')}"
    case = Setting(name, 12, 64, 0, dtype=dtype)
    given = partial(against_given_bias, setting=case)
    register(OPERATOR, name, baseline=GIVEN, devices=("cpu",))(given)
