"""rel_pos_attention in Triton against the formula in float64: sizes, layouts, padding, tiles, what torch does around it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError, rel_pos_attention
from refsam_kernels.core.dispatch import Dispatcher
from refsam_kernels.rel_pos_attention.inputs import Inputs
from refsam_kernels.rel_pos_attention.triton import launches
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import (
    DEVICE,
    DTYPES,
    IS_INTERPRETED,
    on_device,
    slow_in_interpreter,
)
from tests.kernels.rel_pos_attention_cases import RelPosAttentionCases, make_inputs
from tests.kernels.test_rel_pos_attention import one_hot_attention

CASES = {  # images, height, width, heads, head dim, window
    "window2-of-3x2": (1, 3, 2, 1, 16, 2),
    "global-2x3": (1, 2, 3, 2, 80, 0),
}
MORE_CASES = {
    "window3-of-5x4": (1, 5, 4, 1, 16, 3),
    "window14-of-8x16": (1, 8, 16, 1, 64, 14),
    "window3-of-2x2": (1, 2, 2, 1, 80, 3),
    "window2-of-4x2": (1, 4, 2, 1, 64, 2),
    "global-7x13": (1, 7, 13, 1, 80, 0),
    "global-2x70": (1, 2, 70, 1, 20, 0),  # several tiles of queries, several tiles of keys across
    "global-4x16": (1, 4, 16, 1, 48, 0),  # tiles of keys without a masked position
}
SMALL = CASES["window2-of-3x2"]
LARGE_CASES = {  # SAM's own sizes, too much for the interpreter
    "window14-of-64x64": (2, 64, 64, 12, 64, 14),
    "window14-of-40x50": (1, 40, 50, 2, 80, 14),
    "global-64x64": (1, 64, 64, 4, 64, 0),
    "global-80x48": (1, 80, 48, 2, 80, 0),
    "global-33x100": (1, 33, 100, 2, 128, 0),
}


class TestTriton(RelPosAttentionCases):
    backend = "triton"
    case = SMALL
    autocast_dtype = torch.float16
    device = DEVICE


def operator_of(case: tuple[int, ...], pad_mode: str = "bias") -> Callable[..., Any]:
    """The operator with the case's options, on the GPU where there is one."""
    options = {"num_heads": case[3], "window_size": case[5], "pad_mode": pad_mode}
    return on_device(partial(rel_pos_attention, **options))


def small_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The inputs of the smallest case with everything in it: two windows, one of them with padding."""
    return checks.cast(make_inputs(*SMALL), dtype)


def check(case: tuple[int, ...], pad_mode: str, dtype: torch.dtype) -> None:
    """Output and all gradients against the reference."""
    inputs = make_inputs(*case)
    checks.check_matches_reference(operator_of(case, pad_mode), inputs, "triton", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(case, "bias", dtype)


def test_masked_padding_matches_reference() -> None:
    check(SMALL, "mask", torch.float32)


@slow_in_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad_mode", ["bias", "mask"])
@pytest.mark.parametrize("case", MORE_CASES.values(), ids=MORE_CASES)
def test_matches_reference_in_more_sizes(
    case: tuple[int, ...], pad_mode: str, dtype: torch.dtype
) -> None:
    check(case, pad_mode, dtype)


@pytest.mark.skipif(IS_INTERPRETED, reason="too large for Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad_mode", ["bias", "mask"])
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_matches_reference_in_full_size(
    case: tuple[int, ...], pad_mode: str, dtype: torch.dtype
) -> None:
    check(case, pad_mode, dtype)


@slow_in_interpreter
@pytest.mark.parametrize("tile", [(16, 1, 16), (32, 2, 16), (16, 1, 64), (64, 4, 32)])
def test_every_shape_of_tile_gives_the_same(
    tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key tile that does not fit the rows of a window must not be taken for one that does."""
    chosen = launches.Tile(*tile, num_warps=4, num_stages=2)
    monkeypatch.setattr(launches, "default_tile", lambda kernel, problem: chosen)
    case = (1, 5, 20, 1, 16, 0)
    inputs = make_inputs(*case)
    checks.check_matches_reference(operator_of(case), inputs, "triton", torch.float32)


@slow_in_interpreter
def test_one_token() -> None:
    """Its only weight is one, so the gradients of what makes the weight are zero up to rounding."""
    case = (1, 1, 1, 2, 16, 0)
    zero = {"rel_pos_h": "qkv", "rel_pos_w": "qkv"}
    inputs = make_inputs(*case)
    operator = operator_of(case)
    checks.check_matches_reference(operator, inputs, "triton", torch.float32, zero=zero)


@slow_in_interpreter
def test_agrees_with_attention_on_one_hots() -> None:
    inputs = small_inputs()
    wanted = checks.run(
        partial(one_hot_attention, case=SMALL), checks.cast(inputs, torch.float64), ""
    )
    found = checks.run(operator_of(SMALL), inputs, "triton")
    checks.assert_close("output", found[0][0], wanted[0][0], 2e-6)
    for name, gradient in wanted[1].items():
        checks.assert_close(name, found[1][name], gradient, 4e-6)


@slow_in_interpreter
def test_gradient_of_any_layout_is_taken() -> None:
    """The gradient of a sum is an expanded scalar, that of a transposed output transposed."""
    inputs = {name: x.to(DEVICE).requires_grad_() for name, x in small_inputs().items()}
    out = operator_of(SMALL)(**inputs, backend="triton")
    (by_sum,) = torch.autograd.grad(out.sum(), inputs["qkv"], retain_graph=True)
    ones = torch.ones_like(out).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    (by_ones,) = torch.autograd.grad(out, inputs["qkv"], ones)
    assert torch.equal(by_sum, by_ones)


@slow_in_interpreter
def test_opcheck_of_the_backward() -> None:
    tensors = [x.to(DEVICE) for x in small_inputs().values()]
    operators, options = torch.ops.refsam_kernels, (1, 2, "bias")
    saved = operators.rel_pos_attention(*tensors, *options, "triton")
    for needs in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        arguments = (saved[0], *tensors, *saved, *options, needs, "triton")
        torch.library.opcheck(operators.rel_pos_attention_backward.default, arguments)


def test_compile_checkpoint_and_second_derivative() -> None:
    inputs = small_inputs()
    checks.check_compiles(operator_of(SMALL), inputs, "triton")
    checks.check_checkpoint(operator_of(SMALL), inputs, "triton")
    with_triton = partial(
        lambda backend, **tensors: operator_of(SMALL)(backend="triton", **tensors)
    )
    checks.check_second_derivative_raises(with_triton, inputs, "qkv")


REFUSED = {
    "dtype": ((1, 2, 2, 1, 16, 0), torch.float64, "computes float32, float16, bfloat16, got float64"),
    "head": ((1, 2, 2, 1, 144, 0), torch.float32, "takes at most 128 channels in a head, got 144"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_reason(case: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    inputs = checks.cast(make_inputs(*case), dtype)
    with pytest.raises(BackendError, match=message):
        operator_of(case)(**inputs, backend="triton")
    assert torch.isfinite(operator_of(case)(**inputs, backend=None)).all()


def test_backward_refuses_what_the_forward_does() -> None:
    inputs = Inputs(*(x.to(DEVICE) for x in make_inputs(*SMALL).values()), 1, 2, "bias")
    dispatcher = Dispatcher.known["rel_pos_attention"]
    assert dispatcher.not_supported_reasons("triton", "backward", (inputs,)) == [
        "computes float32, float16, bfloat16, got float64"
    ]


PARTS = {
    8: (16, 0),
    16: (16, 0),
    20: (32, 0),
    48: (32, 16),
    64: (64, 0),
    72: (64, 16),
    80: (64, 16),
    96: (64, 32),
    112: (128, 0),
}


@pytest.mark.parametrize(("head_dim", "parts"), PARTS.items())
def test_heads_are_cut_without_waste(head_dim: int, parts: tuple[int, int]) -> None:
    assert launches.split_head_dim(head_dim) == parts


@pytest.mark.parametrize(
    ("width", "columns"), [(14, 16), (32, 32), (40, 16), (48, 16), (64, 64), (80, 16), (128, 64)]
)
def test_tiles_of_keys_cover_the_grids_of_sam_with_little_waste(width: int, columns: int) -> None:
    assert launches.columns_for(width, most=64) == columns
