"""The time of a model's matrix products at the highest rate of a single one: no code with the same products can be faster."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import time_cpu
from refsam_kernels import PackedLinear, flop_formulas

ROWS = 1024
SHAPES = ((768, 768), (768, 2304), (768, 3072), (3072, 768))  # ViT-B's layers
REPEATS = 5


@dataclass(frozen=True)
class Products:
    """The operations of a call's products in 10^9, and the best rate of a packed product in 10^9 a second."""

    gflop: float
    best_rate: float

    @property
    def seconds(self) -> float:
        """The time of the products alone."""
        return self.gflop / self.best_rate


def products_of(call: Callable[[], Any], dtype: torch.dtype) -> Products:
    """Counts the products of a call of an optimized model, and measures the rate of those of ViT-B's layers."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        call()
    return Products(1e-9 * counter.get_total_flops(), best_rate(dtype))


@torch.inference_mode()
def best_rate(dtype: torch.dtype) -> float:
    """The best rate of a packed linear layer, in 10^9 operations a second."""
    rates = []
    for wide, narrow in SHAPES:
        x, weight = torch.randn(ROWS, wide, dtype=dtype), torch.randn(narrow, wide, dtype=dtype)
        call = partial(PackedLinear(weight, None), x)
        seconds = min(time_cpu(call) for _ in range(REPEATS))
        rates.append(2e-9 * ROWS * wide * narrow / seconds)
    return max(rates)


def _formulas() -> dict[Any, Callable[..., int]]:
    """The operators' formulas; those of attention without the queries that are padding, which nothing computes."""
    formulas = flop_formulas()
    for name in ("rel_pos_attention", "rel_pos_attention_backward"):
        packet = getattr(torch.ops.refsam_kernels, name)
        formulas[packet] = partial(_of_real_queries, packet, formulas[packet])
    return formulas


def _of_real_queries(packet: Any, formula: Callable[..., int], *shapes: Any, **options: Any) -> int:
    names = [argument.name for argument in packet.default._schema.arguments]
    given = dict(zip(names, shapes, strict=False))
    (_, height, width, _), size = given["qkv"], given["window_size"]
    padded = ceil(height / size) * ceil(width / size) * size**2 if size else height * width
    return formula(*shapes, **options) * height * width // padded
