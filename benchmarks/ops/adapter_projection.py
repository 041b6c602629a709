"""SAM's attention projection with a space adapter, residual and layer norm, against the same with torch's functions."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._feed_forward import SETTINGS, Random, Setting, workload
from benchmarks.registry import Workload, register
from refsam_kernels import AdapterWeights, adapter_projection

ADAPTER = tuple(f"adapter_{name}" for name in AdapterWeights._fields)


def eager(
    attention: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, **weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula, as RefSAM's release computes it."""
    fc1, bias1, fc2, bias2 = (weights[name] for name in ADAPTER)
    norm = weights["norm_weight"], weights["norm_bias"]
    y = F.linear(attention, weight, bias)
    y = y + F.linear(F.gelu(F.linear(y, fc1, bias1)), fc2, bias2)
    x = residual + y
    return x, F.layer_norm(x, norm[0].shape, *norm, 1e-6).to(attention.dtype)


def fused(
    attention: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    backend: str,
    **weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """The operator, on tensors by name."""
    adapter = AdapterWeights(*(weights[name] for name in ADAPTER))
    norm = weights["norm_weight"], weights["norm_bias"]
    return adapter_projection(attention, residual, weight, bias, adapter, *norm, backend=backend)


def make_inputs(device: str, setting: Setting) -> dict[str, Tensor]:
    """An adapter of a quarter of the width."""
    random, width = Random(setting, device), setting.width
    return {
        "attention": random.operand(*setting.shape),
        "residual": random.stream(*setting.shape),
        "weight": random.operand(width, width, size=width**-0.5),
        "bias": random.operand(width),
        **random.perceptron(width, width // 4, "adapter_"),
        **random.norm(width),
    }


def make(device: str, *, setting: Setting) -> Workload:
    """One setting."""
    width = setting.width
    flops = 2 * setting.frames * setting.tokens * width * (width + 2 * (width // 4))
    return workload(
        "adapter_projection", fused, eager, setting, make_inputs(device, setting), flops
    )


for setting in SETTINGS:
    register("adapter_projection", setting.name, baseline="eager")(partial(make, setting=setting))
