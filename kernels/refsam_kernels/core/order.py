"""Preferred backends on a GPU, as data: the first rule that fits a call decides, else the order of `dispatch.BACKENDS`.

Each rule says what justifies it: a row of benchmarks/results, or "expected, not measured" and why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rule:
    """Backends that go first for calls of an operator; an empty condition fits every call.

    `functions`: "forward", "backward", or a further function; `dtypes`: of the first tensor; `exact`: only float32
    while TF32 is not allowed; `windowed`: only attention in windows.
    """

    operator: str
    first: tuple[str, ...]
    evidence: str
    functions: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    exact: bool = False
    windowed: bool = False

    def fits(self, function: str, values: Sequence[Any]) -> bool:
        """Whether the rule is for a call with these inputs."""
        dtype = first_tensor(values).dtype
        return (
            (not self.functions or function in self.functions)
            and (not self.dtypes or dtype in self.dtypes)
            and not (self.exact and (dtype != torch.float32 or allows_tf32()))
            and not (self.windowed and not in_windows(values))
        )


WITHOUT_TENSOR_CORES = "expected, not measured: exact float32 has no tensor cores, and cuBLAS multiplies faster than tl.dot"
RULES = (
    Rule(
        "rel_pos_attention",
        ("cuda", "triton"),
        "expected, not measured: 208 keys are computed for 196, Triton's tiles compute 256",
        functions=("forward",),
        windowed=True,
        dtypes=HALF,
    ),
    Rule(
        "mask_postprocess",
        ("cuda", "triton"),
        "expected, not measured: a ballot gives a word of bits, Triton shifts and adds 32 values",
        functions=("bits", "runs"),
    ),
    *(
        Rule(operator, ("fallback",), WITHOUT_TENSOR_CORES, exact=True)
        for operator in (
            "rel_pos_attention",
            "adapter_mlp",
            "adapter_projection",
            "dense_attention",
            "token_image_attention",
            "mask_upscale",
        )
    ),
)


def allows_tf32() -> bool:
    """Whether float32 products may be rounded to TF32, by torch.backends.cuda.matmul or set_float32_matmul_precision."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # the newer setting was used
        return getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32"


def first_tensor(values: Sequence[Any]) -> Tensor:
    """The first tensor of a call's inputs."""
    return next(value for value in values if isinstance(value, Tensor))


def in_windows(values: Sequence[Any]) -> bool:
    """Whether inputs of rel_pos_attention ask for windows; its integers are num_heads and window_size."""
    _, window_size = (value for value in values if type(value) is int)
    return window_size > 0


def order_of(
    operator: str, function: str, values: Sequence[Any], names: Sequence[str]
) -> list[str]:
    """The backends' `names`, those of the first rule that fits the inputs in front; off a GPU as they are."""
    if first_tensor(values).device.type != "cuda":
        return list(names)
    fitting = (rule for rule in RULES if rule.operator == operator and rule.fits(function, values))
    first = next((rule.first for rule in fitting), ())
    return [*first, *(name for name in names if name not in first)]
