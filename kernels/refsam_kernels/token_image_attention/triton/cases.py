"""The configurations that `token_image_attention` ships in Triton, for the compile gate."""

from collections.abc import Iterator
from typing import Any

import torch

from refsam_kernels.core.reasons import short
from refsam_kernels.core.triton_aot import DECODERS, CompileCase, Launch
from refsam_kernels.token_image_attention.inputs import Inputs, empty_outputs
from refsam_kernels.token_image_attention.projection import Projection
from refsam_kernels.token_image_attention.triton.launches import (
    backward_launch,
    few_keys_launch,
    many_keys_launches,
    sizes_of,
)


def compile_cases() -> list[CompileCase]:
    """SAM's decoder and nano's, both directions with saved outputs, short and long expressions."""
    cases = []
    for dtype, channels, tokens in DECODERS:
        name = f"{short(dtype)}, {channels} channels, {tokens} tokens"
        for kind, launch in _example_launches(dtype, channels, tokens):
            # Rows of 256 channels in single precision do not fit the registers, by some 40 of their values.
            is_judged = dtype != torch.float32 or kind != "to many keys"
            limit = {} if is_judged else {"spill_limit": None}
            cases.append(launch.compile_case(f"{kind}, {name}", **limit))
    return cases


def _example_launches(
    dtype: torch.dtype, channels: int, tokens: int
) -> Iterator[tuple[str, Launch]]:
    """Eight expressions' launches on the meta device, 16 channels to a head."""
    internal, heads = channels // 2, channels // 32
    few = torch.empty(8, tokens, channels, dtype=dtype, device="meta")
    many = few.new_empty(8, 4096, channels)
    weight, bias = few.new_empty(internal, channels), few.new_empty(internal)
    lengths = torch.empty(8, dtype=torch.int64, device="meta")
    for queries, keys, key_lengths in ((few, many, None), (many, few, lengths)):
        norm = torch.empty(channels, device="meta")
        weights = (weight, bias, weight, bias, weight, bias, weight.T, few.new_empty(channels))
        tensors: Any = (queries, keys, queries[:1], keys[:1], *weights, norm, norm)
        inputs = Inputs(*tensors, key_lengths, heads, 1e-5, True)  # type: ignore[call-arg]
        outputs = empty_outputs(inputs)
        values: dict[str, Any] = outputs._asdict() | sizes_of(inputs)
        values |= {"lengths": key_lengths, "residual": queries}
        values |= {"out_weight": weight.T.contiguous(), "out_added": few.new_empty(channels)}
        values |= {"norm_weight": norm, "norm_bias": norm}
        to_q = Projection(queries, queries[:1], weight, bias)
        to_k, to_v = (Projection(keys, pe, weight, None) for pe in (keys[:1], None))
        if keys is few:
            yield "to few keys", few_keys_launch(to_q, values)
        else:
            names = ("to many keys", "join")
            yield from zip(names, many_keys_launches(to_k, to_v, values), strict=True)
        backward = outputs._asdict() | {"grad": outputs.attended}
        backward = {name: backward[name] for name in ("grad", *"qkv", "attended", "log_sum_exp")}
        launch, _ = backward_launch(backward, key_lengths, heads)
        yield f"backward to {'few' if keys is few else 'many'} keys", launch
