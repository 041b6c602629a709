"""`rel_pos_attention` in Triton, forward and backward: scores exist a tile at a time only, windows are never padded.

The forward is one launch, the backward two and one per table that is not frozen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refsam_kernels.core.libraries import reasons_against_device
from refsam_kernels.core.reasons import KERNEL_DTYPES, dtype_reasons, limit_reasons
from refsam_kernels.rel_pos_attention.inputs import Inputs, Outputs, empty_outputs
from refsam_kernels.rel_pos_attention.triton.cases import compile_cases
from refsam_kernels.rel_pos_attention.triton.launches import (
    Operands,
    Problem,
    forward_launch,
    key_tiles,
    launch_of,
    table_gradient_launch,
    table_parts,
)

__all__ = ["backward", "compile_cases", "forward", "not_supported_reasons"]

MOST_CHANNELS = 128  # of a head


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernels cannot compute these; empty if they can."""
    qkv, limit = inputs.qkv, ("channels in a head", inputs.head_dim, MOST_CHANNELS)
    reasons = dtype_reasons(KERNEL_DTYPES, qkv) + limit_reasons(limit)
    if qkv.dtype == torch.bfloat16 and not qkv.is_cuda:
        reasons.append("Triton's interpreter cannot multiply bfloat16")
    return reasons + reasons_against_device(qkv)


def forward(inputs: Inputs) -> Outputs:
    """Output (B, h, w, D) and the logarithm of each softmax's sum (B, heads, h, w), float32."""
    problem, outputs = Problem.of(inputs.qkv, *inputs[4:]), empty_outputs(inputs)
    forward_launch(problem, make_operands(inputs), *outputs).run()
    return outputs


def backward(
    inputs: Inputs, outputs: Outputs, grads: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients with respect to qkv, both tables and the bias of padding tokens."""
    qkv, log_sum_exp = inputs.qkv, outputs.log_sum_exp
    problem, operands = Problem.of(qkv, *inputs[4:]), make_operands(inputs)
    tensors = {
        "grad_out": grads[0].contiguous(),
        "log_sum_exp": log_sum_exp,
        "grad_qkv": torch.empty_like(qkv, memory_format=torch.contiguous_format),
        "delta": torch.empty_like(log_sum_exp),
    }
    tensors["rel_h"], tensors["rel_w"] = operands.scratch(problem)
    # Positions without a key are not written.
    d_rel = operands.scratch(problem, zero=problem.is_cropped)
    of_queries = {**tensors, "out": outputs.out, "d_rel_h": d_rel[0], "d_rel_w": d_rel[1]}
    launch_of("query_gradient", problem, operands, of_queries).run()
    padding = key_gradients(problem, operands, tensors) if needs[0] or needs[3] else None
    tables = [
        table_gradient(problem, qkv, d_rel[axis], of_rows=axis == 0) if needs[1 + axis] else None
        for axis in (0, 1)
    ]
    return [tensors["grad_qkv"], *tables, padding]


def key_gradients(problem: Problem, operands: Operands, tensors: dict[str, Tensor]) -> Tensor:
    """Fills the keys' and values' part of `grad_qkv`; returns the sum over padding tokens (3, heads, head_dim), float32."""
    heads, head_dim = problem.heads, problem.head_dim
    total = operands.qkv.new_zeros(3, heads, head_dim, dtype=torch.float32)
    parts = None
    if problem.is_padded:
        shape = (problem.windows // heads, heads, key_tiles(problem), 2, head_dim)
        parts = operands.qkv.new_empty(shape, dtype=torch.float32)
    launch_of("key_gradient", problem, operands, {**tensors, "grad_padding": parts}).run()
    if parts is not None:
        total[1:] = parts.sum((0, 2)).transpose(0, 1)
    return total


def table_gradient(problem: Problem, qkv: Tensor, d_rel: Tensor, *, of_rows: bool) -> Tensor:
    """The gradient of one axis' table (2*size-1, head_dim), float32."""
    parts = table_parts(problem, qkv, of_rows=of_rows)
    table_gradient_launch(problem, qkv, d_rel, parts, of_rows=of_rows).run()
    return parts.sum(0)


def make_operands(inputs: Inputs) -> Operands:
    """The tensors as the kernels read them."""
    bias = None if inputs.qkv_bias is None else inputs.qkv_bias.contiguous()
    tables = (inputs.rel_pos_h.contiguous(), inputs.rel_pos_w.contiguous())
    return Operands(inputs.qkv, *tables, bias)
