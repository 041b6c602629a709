"""The formula of `adapter_projection`, in segment-anything's order of operations."""

import torch.nn.functional as F
from torch import Tensor

from refsam_kernels.adapter_projection.inputs import Inputs, Outputs
from refsam_kernels.core.gradients import derived_backward
from refsam_kernels.feed_forward.mlp import empty_kept, kept_of
from refsam_kernels.feed_forward.torch_steps import (
    empty_statistics,
    layer_norm,
    row_statistics,
)


def forward(inputs: Inputs) -> Outputs:
    """x and its layer norm; for the backward, the norm's statistics, and with an adapter the projection and its values."""
    attention, keep = inputs.attention, inputs.keep
    projected = F.linear(attention, inputs.weight, inputs.bias)
    adapted = projected
    saved: tuple[Tensor, ...] = (attention.new_empty(0), *empty_kept(projected, None, keep))
    if inputs.adapter is not None:
        hidden = F.linear(projected, *inputs.adapter[:2])
        activated = F.gelu(hidden)
        adapted = projected + F.linear(activated, *inputs.adapter[2:])
        saved = (projected, *kept_of(hidden, activated, keep)) if keep else saved
    x = inputs.residual + adapted
    normed = layer_norm(x, inputs.norm_weight, inputs.norm_bias, inputs.eps)[0]
    statistics = row_statistics(x, inputs.eps) if keep else empty_statistics(x, False)
    return Outputs(x.contiguous(), normed.to(attention.dtype), *statistics, *saved)


backward = derived_backward(forward, *Inputs._fields[:10])
