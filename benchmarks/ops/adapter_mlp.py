"""SAM's MLP with a parallel adapter, residual and layer norm, against the same with torch's functions."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._feed_forward import SETTINGS, Random, Setting, workload
from benchmarks.registry import Workload, register
from refsam_kernels import AdapterWeights, adapter_mlp

MLP = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def eager(normed: Tensor, residual: Tensor, **weights: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, as RefSAM's release computes it."""
    norm = weights["norm_weight"], weights["norm_bias"]
    mlp, adapter = (
        F.linear(F.gelu(F.linear(normed, fc1, bias1)), fc2, bias2)
        for fc1, bias1, fc2, bias2 in (
            (weights[prefix + name] for name in MLP) for prefix in ("", "adapter_")
        )
    )
    x = residual + mlp + 0.5 * adapter
    return x, F.layer_norm(x, norm[0].shape, *norm, 1e-6).to(normed.dtype)


def fused(
    normed: Tensor, residual: Tensor, backend: str, **weights: Any
) -> tuple[Tensor, Tensor | None]:
    """The operator, on tensors by name."""
    adapter = AdapterWeights(*(weights.pop(f"adapter_{name}") for name in MLP))
    return adapter_mlp(normed, residual, adapter=adapter, backend=backend, **weights)


def make_inputs(device: str, setting: Setting) -> dict[str, Tensor]:
    """An MLP of four times the width, an adapter of a quarter of it."""
    random, width = Random(setting, device), setting.width
    return {
        "normed": random.operand(*setting.shape),
        "residual": random.stream(*setting.shape),
        **random.perceptron(width, 4 * width),
        **random.perceptron(width, width // 4, "adapter_"),
        **random.norm(width),
    }


def make(device: str, *, setting: Setting) -> Workload:
    """One setting."""
    width = setting.width
    flops = 4 * setting.frames * setting.tokens * width * (4 * width + width // 4)
    return workload("adapter_mlp", fused, eager, setting, make_inputs(device, setting), flops)


for setting in SETTINGS:
    register("adapter_mlp", setting.name, baseline="eager")(partial(make, setting=setting))
