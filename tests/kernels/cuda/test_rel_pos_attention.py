"""rel_pos_attention in CUDA C++ against the formula in float64: sizes, padding, layouts, and the checks that stand in C++."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refsam_kernels import BackendError, rel_pos_attention
from refsam_kernels.core import libraries
from refsam_kernels.rel_pos_attention import reference
from refsam_kernels.rel_pos_attention.inputs import Inputs
from tests.kernels import operator_checks as checks
from tests.kernels.emulator import DEVICE
from tests.kernels.interpreter import on_device
from tests.kernels.rel_pos_attention_cases import RelPosAttentionCases, make_inputs

DTYPES = [torch.float16, torch.bfloat16]
CASES = {  # images, height, width, heads, head dim, window
    "global-5x7": (3, 5, 7, 2, 80, 0),
    "global-14x14": (1, 14, 14, 1, 64, 0),
    "global-2x70": (1, 2, 70, 1, 32, 0),  # several tiles of keys across, tables of many rows
    "window4-of-10x9": (1, 10, 9, 1, 32, 4),
    "window14-of-16x15": (1, 16, 15, 1, 64, 14),  # all four shapes of a window
    "window14-of-8x14": (2, 8, 14, 2, 80, 14),
    "window14-of-16x6": (1, 16, 6, 1, 32, 14),  # not the kernel of SAM's windows
}
LARGE_CASES = {  # SAM's own sizes, too much for the emulator
    "window14-of-64x64": (2, 64, 64, 12, 64, 14),
    "window14-of-40x50": (1, 40, 50, 2, 80, 14),
    "global-64x64": (1, 64, 64, 4, 64, 0),
    "global-80x48": (1, 80, 48, 2, 80, 0),
    "global-33x100": (1, 33, 100, 2, 32, 0),
}
SMALL = (1, 6, 5, 2, 32, 4)  # windows with and without padding
SAM_WINDOW = (1, 14, 9, 1, 64, 14)


class TestTiles(RelPosAttentionCases):
    """The kernel of any grid and window."""

    backend = "cuda"
    case = SMALL
    dtype = torch.float16
    log_sum_exp_error = 2e-6
    device = DEVICE

    @pytest.mark.slow
    def test_opcheck(self) -> None:
        super().test_opcheck()


class TestWholeWindow(TestTiles):
    """The kernel of SAM's windows."""

    case = SAM_WINDOW


def operator_of(case: tuple[int, ...], pad_mode: str = "bias") -> Callable[..., Any]:
    """The operator with the case's options, on the GPU where there is one."""
    options = {"num_heads": case[3], "window_size": case[5], "pad_mode": pad_mode}
    return on_device(partial(rel_pos_attention, **options))


def inputs_of(case: tuple[int, ...], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return checks.cast(make_inputs(*case), dtype)


def check(case: tuple[int, ...], pad_mode: str, dtype: torch.dtype) -> None:
    """Output and all gradients, which another backend computes of what is saved, against the reference."""
    checks.check_matches_reference(operator_of(case, pad_mode), make_inputs(*case), "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(case, "bias", dtype)


@pytest.mark.parametrize("case", ["window4-of-10x9", "window14-of-8x14"])
def test_masked_padding_matches_reference(case: str) -> None:
    check(CASES[case], "mask", torch.float16)


def test_whole_windows_need_no_padding() -> None:
    check((1, 4, 8, 1, 32, 4), "none", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tiles_match_reference(dtype: torch.dtype) -> None:
    check((1, 32, 32, 1, 32, 0), "bias", dtype)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_matches_reference_at_any_size(data: st.DataObject) -> None:
    case = (
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 17)),
        data.draw(st.integers(1, 17)),
        data.draw(st.integers(1, 2)),
        data.draw(st.sampled_from([32, 64, 80])),
        data.draw(st.sampled_from([0, 3, 8, 14, 20])),
    )
    tensors = list(inputs_of(case).values())
    options = (case[3], case[5], data.draw(st.sampled_from(["bias", "mask"])))
    forward = torch.ops.refsam_kernels.rel_pos_attention
    out, log_sum_exp = forward(*(x.to(DEVICE) for x in tensors), *options, "cuda")
    exact = reference.forward(Inputs(*(x.double() for x in tensors), *options))
    checks.assert_close("output", out.cpu(), exact[0], checks.TOLERANCES[torch.float16])
    checks.assert_close("log_sum_exp", log_sum_exp.cpu(), exact[1], 2e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="too large for the emulator")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad_mode", ["bias", "mask"])
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_matches_reference_in_full_size(
    case: tuple[int, ...], pad_mode: str, dtype: torch.dtype
) -> None:
    check(case, pad_mode, dtype)


@pytest.mark.parametrize("window", [0, 14], ids=["global", "window"])
def test_one_token(window: int) -> None:
    """Without padding its only weight is one, and the gradients of what makes the weight are zero up to rounding."""
    case = (1, 1, 1, 2, 64, window)
    inputs = make_inputs(*case)
    zero = {"rel_pos_h": "qkv", "rel_pos_w": "qkv"}
    operator = operator_of(case, "mask")
    checks.check_matches_reference(operator, inputs, "cuda", torch.float16, zero=zero)


@pytest.mark.parametrize("case", [SMALL, SAM_WINDOW], ids=["tiles", "whole-window"])
def test_nan_stays_visible(case: tuple[int, ...]) -> None:
    """A query that is NaN spoils its own output, and no other query's."""
    inputs = inputs_of(case)
    head_dim = case[4]
    inputs["qkv"][0, 1, 2, :head_dim] = float("nan")
    out = operator_of(case)(**inputs, backend="cuda")
    assert out[0, 1, 2, :head_dim].isnan().all()
    assert out.isnan().sum() == head_dim


@pytest.mark.slow  # asks for 9 GB of memory, of which it touches a few pages
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has no memory that is not touched")
def test_large_strides_are_read_without_overflow() -> None:
    """Rows so far apart that their distance in elements does not fit 32 bits."""
    stride = 2**31 + 8
    room = torch.from_numpy(np.empty(2 * stride + 384, np.float16))  # torch would fill it
    dense = inputs_of((1, 3, 2, 1, 32, 0))
    far = room.as_strided(dense["qkv"].shape, (0, stride, 96, 1)).copy_(dense["qkv"])
    operator = operator_of((1, 3, 2, 1, 32, 0))
    wanted = operator(**dense, backend="cuda")
    assert torch.equal(operator(**dense | {"qkv": far}, backend="cuda"), wanted)


def test_tables_and_bias_may_lie_anywhere() -> None:
    inputs = inputs_of(SMALL)
    wanted = operator_of(SMALL)(**inputs, backend="cuda")
    for name in ("rel_pos_h", "rel_pos_w", "qkv_bias"):
        room = inputs[name].new_full((inputs[name].numel() + 1,), float("nan"))
        inputs[name] = room[1:].copy_(inputs[name].flatten()).view(inputs[name].shape)
    assert torch.equal(operator_of(SMALL)(**inputs, backend="cuda"), wanted)


def test_window_much_larger_than_the_grid() -> None:
    """Without padding it is the grid, and the tables' middle."""
    case = (1, 2, 3, 1, 32, 3000)
    inputs = inputs_of(case)
    out = operator_of(case, "mask")(**inputs, backend="cuda")
    inputs["rel_pos_h"] = inputs["rel_pos_h"][2999 - 1 : 2999 + 2]
    inputs["rel_pos_w"] = inputs["rel_pos_w"][2999 - 2 : 2999 + 3]
    wanted = operator_of((*case[:5], 0))(**inputs, backend="cuda")
    assert torch.equal(out, wanted)


def test_largest_window_that_shared_memory_holds() -> None:
    case = (1, 2, 2, 1, 80, 96)
    inputs = inputs_of(case)
    exact = operator_of(case)(**checks.cast(inputs, torch.float64), backend="fallback")
    found = operator_of(case)(**inputs, backend="cuda")
    checks.assert_close("output", found, exact, checks.TOLERANCES[torch.float16])


REFUSED = {
    "dtype": ((1, 2, 2, 1, 32, 0), torch.float32, "computes float16, bfloat16, got float32"),
    "head": ((1, 2, 2, 1, 48, 0), torch.float16, "has kernels for 32, 64, 80 channels in a head, got 48"),
    "sides": ((1, 2, 191, 1, 32, 0), torch.float16, "takes at most 192 rows and columns of keys, got 193"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_reason(case: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    inputs = inputs_of(case, dtype)
    with pytest.raises(BackendError, match=re.escape(message)):
        operator_of(case)(**inputs, backend="cuda")
    assert torch.isfinite(operator_of(case)(**inputs, backend=None)).all()


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16, device=DEVICE)


def tables(rows: int, head_dim: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {name: half(rows, head_dim).to(dtype) for name in ("rel_pos_h", "rel_pos_w")}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"qkv": half(9, 9, 192)}, "qkv: got 3 dimensions, wanted 4"),
    "dtype": ({"qkv": half(1, 9, 9, 192).float(), **tables(7, 32, torch.float32)}, "got dtype Float, wanted Half or BFloat16"),
    "width": ({"qkv": half(1, 9, 9, 50)}, "qkv: got 50 channels, wanted a multiple of 3 * num_heads = 6"),
    "head-dim": ({"qkv": half(1, 9, 9, 96), **tables(7, 16)}, "qkv: got head dimension 16, wanted 32, 64 or 80"),
    "last-stride": ({"qkv": half(1, 9, 192, 9).mT}, "qkv: got stride 9 of the last dimension, wanted 1"),
    "strides": ({"qkv": half(1, 9, 9, 196)[..., :192]}, "qkv: got stride 15876 of dimension 0, wanted a multiple of 8"),
    "memory": ({"qkv": half(1, 9, 9, 200)[..., 4:196]}, "qkv: got memory that does not begin at a multiple of 16 bytes"),
    "heads": ({"num_heads": 0}, "num_heads: got 0, wanted 1 to 192"),
    "table": ({"rel_pos_h": half(9, 32)}, "rel_pos_h: got 9 x 32, wanted 7 x 32"),
    "table-dtype": ({"rel_pos_w": half(7, 32).double()}, "rel_pos_w: got dtype Double, wanted Half"),
    "table-strides": ({"rel_pos_w": half(32, 7).T}, "rel_pos_w: got strides of a view"),
    "table-memory": ({"rel_pos_w": half(225)[1:].view(7, 32)}, "rel_pos_w: got memory that does not begin"),
    "bias": ({"qkv_bias": half(191)}, "qkv_bias: got 191 numbers, wanted 192"),
    "window": ({"window_size": 2**40}, "window_size: got 1099511627776, wanted 0 to"),
    "sides": ({"window_size": 97, **tables(193, 32)}, "rows and columns of keys, together: got 194, wanted 2 to 192"),
    "pad-mode": ({"pad_mode": "zero"}, "pad_mode: got 'zero', wanted bias, mask or none"),
    "does-not-fit": ({"pad_mode": "none"}, "window_size: got 4, wanted a divisor of the grid"),
}  # fmt: skip


def call_library(**change: Any) -> Any:
    """Straight into C++, past the checks of the public function."""
    arguments: dict[str, Any] = {
        "qkv": half(1, 9, 9, 192),
        **tables(7, 32),
        "qkv_bias": None,
        "num_heads": 2,
        "window_size": 4,
        "pad_mode": "bias",
    }
    return libraries.load("cuda").rel_pos_attention(*(arguments | change).values())


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_library_names_the_argument_that_fails(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call_library(**change)


@pytest.mark.skipif(DEVICE == "cpu", reason="to the emulator the CPU is the CUDA device")
def test_library_takes_tensors_of_one_device() -> None:
    with pytest.raises(RuntimeError, match="rel_pos_h: got a tensor of another device"):
        call_library(rel_pos_h=half(7, 32).cpu())
