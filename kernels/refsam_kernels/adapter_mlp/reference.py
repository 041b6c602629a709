"""The formula of `adapter_mlp`, in segment-anything's order of operations."""

import torch.nn.functional as F

from refsam_kernels.adapter_mlp.inputs import Inputs, Outputs
from refsam_kernels.core.gradients import derived_backward
from refsam_kernels.core.registration import or_empty
from refsam_kernels.feed_forward.mlp import empty_kept, kept_of
from refsam_kernels.feed_forward.torch_steps import (
    empty_statistics,
    layer_norm,
    row_statistics,
)


def forward(inputs: Inputs) -> Outputs:
    """x and its layer norm; for the backward, the norm's statistics and the values that each MLP keeps."""
    normed, keep = inputs.normed, inputs.keep
    normed_next = None
    hidden = F.linear(normed, *inputs.mlp[:2])
    activated = F.gelu(hidden)
    x = inputs.residual + F.linear(activated, *inputs.mlp[2:])
    kept = kept_of(hidden, activated, keep)
    adapter_kept = empty_kept(normed, None, keep)
    if inputs.adapter is not None:
        hidden = F.linear(normed, *inputs.adapter[:2])
        activated = F.gelu(hidden)
        x = x + inputs.scale * F.linear(activated, *inputs.adapter[2:])
        adapter_kept = kept_of(hidden, activated, keep)
    statistics = empty_statistics(x, False)
    if inputs.norm_weight is not None and inputs.norm_bias is not None:
        norm = (inputs.norm_weight, inputs.norm_bias, inputs.eps)
        normed_next = layer_norm(x, *norm)[0].to(normed.dtype)
        statistics = row_statistics(x, inputs.eps) if keep else statistics
    normed_next = or_empty(normed_next, normed)
    return Outputs(x.contiguous(), normed_next, *statistics, *kept, *adapter_kept)


backward = derived_backward(forward, *Inputs._fields[:12])
