"""Attention between few tokens and many pixels in Triton, with the output projection, residual and LayerNorm in the same kernel.

The pixels' projections are made in registers, head by head, from the tile of pixels that a program holds; those of the few
tokens are small matrix products before it. Pixels to tokens: the keys are one tile, and a program ends with rows of the result.
Tokens to pixels: a program has a tile of keys, and a second kernel joins the tiles in their order. The backward's matrix products
are those of `fallback.py`; its attention is one kernel for both directions. No atomics: two runs agree bit by bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refsam_kernels.core.reasons import KERNEL_DTYPES, dtype_reasons, limit_reasons
from refsam_kernels.token_image_attention import fallback
from refsam_kernels.token_image_attention.fallback import without_padding
from refsam_kernels.token_image_attention.inputs import Inputs, Outputs, empty_outputs
from refsam_kernels.token_image_attention.projection import Projection
from refsam_kernels.token_image_attention.triton.cases import compile_cases
from refsam_kernels.token_image_attention.triton.launches import (
    FEW,
    backward_launch,
    few_keys_launch,
    many_keys_launches,
    sizes_of,
)

__all__ = ["backward", "compile_cases", "forward", "not_supported_reasons"]

WIDEST_CHANNELS = 512
WIDEST_HEAD = 128


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernels cannot compute these."""
    queries, q_weight = inputs.queries, inputs.q_weight
    limits = limit_reasons(
        ("channels", queries.shape[2], WIDEST_CHANNELS),
        ("channels in a head", len(q_weight) // inputs.num_heads, WIDEST_HEAD),
        ("queries, or as many keys", min(queries.shape[1], inputs.keys.shape[1]), FEW),
    )
    return dtype_reasons(KERNEL_DTYPES, queries, q_weight) + limits


def forward(inputs: Inputs) -> Outputs:
    """Like `reference.forward`: products in the dtype of the weights, sum, softmax and LayerNorm in float32."""
    inputs, keep = without_padding(inputs), inputs.keep
    queries, keys, query_pe, key_pe = inputs[:4]
    q_weight, q_bias, k_weight, _, v_weight, v_bias, out_weight, out_bias = inputs.weights
    to_q = Projection(queries, query_pe, q_weight, q_bias, remember=not keep)
    to_k = Projection(keys, key_pe, k_weight, None, remember=not keep)
    to_v = Projection(keys, None, v_weight, None)
    whole, has_few_keys = slice(len(queries)), keys.shape[1] <= FEW
    made = {"k": to_k(whole), "v": to_v(whole)} if has_few_keys else {"q": to_q(whole)}
    outputs = empty_outputs(inputs)
    outputs = outputs._replace(**made) if keep else outputs
    lengths = inputs.key_lengths
    values: dict[str, Any] = {
        **dict.fromkeys(Outputs._fields),  # None: not kept
        **(outputs._asdict() if keep else {"out": outputs.out}),
        **made,
        **sizes_of(inputs),
        "lengths": None if lengths is None else lengths.contiguous(),
        "residual": queries.contiguous(),
        "out_weight": out_weight.contiguous(),
        "out_added": torch.addmv(out_bias, out_weight, v_bias),
        "norm_weight": inputs.norm_weight.contiguous(),
        "norm_bias": inputs.norm_bias.contiguous(),
    }
    if has_few_keys:
        launches = [few_keys_launch(to_q, values)]
    else:
        launches = many_keys_launches(to_k, to_v, values)
    for launch in launches:
        launch.run()
    return outputs


def backward(
    inputs: Inputs, outputs: Outputs, grads: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Like `reference.backward`; of the forward only the attention's probabilities are computed again."""
    return fallback.backward(inputs, outputs, grads, needs, _attend_backward)


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    log_sum_exp: Tensor,
    key_lengths: Tensor | None,
    num_heads: int,
) -> list[Tensor]:
    """Gradients to q, k and v for the gradient to the attended values."""
    tensors = {"q": q, "k": k, "v": v, "attended": attended, "log_sum_exp": log_sum_exp}
    tensors = {name: x.contiguous() for name, x in (tensors | {"grad": grad}).items()}
    lengths = None if key_lengths is None else key_lengths.contiguous()
    launch, gradients = backward_launch(tensors, lengths, num_heads)
    launch.run()
    return [
        parts[0] if len(parts) == 1 else parts.sum(0).to(own.dtype)
        for parts, own in zip(gradients, (q, k, v), strict=True)
    ]
