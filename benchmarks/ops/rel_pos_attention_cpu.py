"""Global attention of SAM's ViT-B against plain attention that is given its bias ready-made, which needs N x N memory.

The baseline does less: its bias is made before the clock starts, and so are q, k and v apart.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Workload, backends_of, register
from refsam_kernels import rel_pos_attention

OPERATOR = "rel_pos_attention"
DTYPES = (torch.float32, torch.bfloat16)


def ready_made_bias(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: int) -> Tensor:
    """The relative terms (1, heads, N, N) of queries (1, heads, N, head_dim) on a square grid."""
    positions = torch.arange(grid, device=q.device)
    distances = positions[:, None] - positions[None, :] + grid - 1
    queries = q.unflatten(2, (grid, grid))
    rel_h = torch.einsum("bnyxc,ykc->bnyxk", queries, rel_pos_h[distances])
    rel_w = torch.einsum("bnyxc,xkc->bnyxk", queries, rel_pos_w[distances])
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2).flatten(2, 3)


def workload(device: str, *, dtype: torch.dtype, heads: int, head_dim: int, grid: int) -> Workload:
    """One image; tensors of the size that they have in SAM's checkpoints."""
    generator = torch.Generator().manual_seed(42)
    width = heads * head_dim
    shapes = {
        "qkv": (1, grid, grid, 3 * width),
        "rel_pos_h": (2 * grid - 1, head_dim),
        "rel_pos_w": (2 * grid - 1, head_dim),
    }
    inputs = {
        name: (torch.randn(shape, generator=generator) * (1.0 if name == "qkv" else 0.3)).to(
            device, dtype
        )
        for name, shape in shapes.items()
    }
    attend: Any = partial(rel_pos_attention, num_heads=heads)
    q, k, v = inputs["qkv"].flatten(1, 2).unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    bias = ready_made_bias(q, inputs["rel_pos_h"], inputs["rel_pos_w"], grid)
    plain = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=bias)
    exact = {name: tensor.float() for name, tensor in inputs.items()}
    expected = attend(**exact, backend="fallback")

    def baseline() -> Tensor:
        return plain().transpose(1, 2).unflatten(1, (grid, grid))

    return Workload(
        providers={
            "sdpa, bias given": baseline,
            **{
                name: partial(attend, **inputs, backend=name)
                for name in backends_of(OPERATOR, device)
            },
        },
        wrong=partial(too_far, expected=expected, tolerance=2 * error_of(baseline(), expected)),
        moved_bytes=sum(tensor.nbytes for tensor in inputs.values()) + q.nbytes,
        flops=4 * heads * head_dim * grid**4,
        shapes={name: list(shape) for name, shape in shapes.items()} | {"dtype": str(dtype)},
        dtype=dtype,
    )


def error_of(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest value; heads lie side by side in a result or in a dimension of their own."""
    difference = found.float().reshape(expected.shape) - expected
    return float(difference.abs().max() / expected.abs().max())


def too_far(found: Tensor, *, expected: Tensor, tolerance: float) -> str | None:
    """The error of a result, None up to twice the baseline's own, as in the tests."""
    error = error_of(found, expected)
    return None if error <= tolerance else f"error {error:.1e}, at most {tolerance:.1e} may be"


for dtype in DTYPES:
    make = partial(workload, dtype=dtype, heads=12, head_dim=64, grid=64)
    name = f"ViT-B global, {str(dtype).removeprefix('torch.')}"
    register("rel_pos_attention_cpu", name, baseline="sdpa, bias given")(make)
