"""The steps between the matrix products of the forwards of `adapter_mlp` and `adapter_projection`, in CUDA.

csrc/cuda/feed_forward.cu: a product's bias with the GELU, a sum with its layer norm. Other backends run the backwards.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.core import libraries
from refsam_kernels.feed_forward import mlp
from refsam_kernels.feed_forward.torch_steps import TORCH_STEPS, Normed, Sum

_library = libraries.load("cuda")


def hidden_layer(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """`torch_steps.hidden_layer`; bias and GELU in one pass behind the product."""
    hidden = F.linear(x, weight).contiguous()
    activated = torch.empty_like(hidden) if keep else None
    _library.bias_gelu_(hidden, bias.contiguous(), activated)
    return hidden, hidden if activated is None else activated


def add_and_norm(terms: Sum) -> Normed:
    """`torch_steps.add_and_norm` in one pass over the rows."""
    arguments = (x.contiguous() if isinstance(x, Tensor) else x for x in terms)
    x, normed, *statistics = _library.add_and_norm(*arguments)
    return Normed(x, None if terms.norm_weight is None else normed, *statistics)


def not_supported_reasons(inputs: Any) -> list[str]:
    """Why the kernels cannot compute these, or not on this GPU."""
    return mlp.not_supported_reasons(inputs) + libraries.reasons_against_device(inputs[0])


CUDA_STEPS = TORCH_STEPS._replace(hidden_layer=hidden_layer, add_and_norm=add_and_norm)
