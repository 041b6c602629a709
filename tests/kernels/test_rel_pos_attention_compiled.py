"""The compiled CPU backend of rel_pos_attention: every instruction set, threads, and the checks that stand in C++."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refsam_kernels import rel_pos_attention
from refsam_kernels.core import libraries
from refsam_kernels.core.dispatch import BackendError
from refsam_kernels.rel_pos_attention import reference
from refsam_kernels.rel_pos_attention.inputs import Inputs
from tests.heap import bytes_left_by
from tests.kernels import operator_checks as checks
from tests.kernels.rel_pos_attention_cases import Case, make_inputs

INSTRUCTION_SETS = ["portable", "avx2", "avx512", "avx512bf16"]


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    """The library's operators; the tests are skipped with the reason if it was not built."""
    try:
        return libraries.load("cpu")
    except ImportError as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(
    request: pytest.FixtureRequest, library: Any, monkeypatch: pytest.MonkeyPatch
) -> str:
    """An instruction set that this processor has, which the backend is made to use."""
    try:
        library.rel_pos_attention(
            *arguments_of(make_inputs(0, 1, 1, 1, 1, 0, torch.float32), 1, 0, request.param)
        )
    except RuntimeError as reason:
        pytest.skip(str(reason).splitlines()[0])
    monkeypatch.setenv("REFSAM_CPU_INSTRUCTION_SET", request.param)
    return request.param


def arguments_of(
    inputs: dict[str, Tensor], heads: int, window: int, instruction_set: str = ""
) -> list[Any]:
    """The arguments of the library's forward."""
    return [*inputs.values(), heads, window, "bias", instruction_set]


def operator_of(sizes: Case, pad_mode: str = "bias") -> checks.Operator:
    return partial(rel_pos_attention, num_heads=sizes[3], window_size=sizes[5], pad_mode=pad_mode)


SIZES: dict[str, Case] = {
    "windows-with-padding": (1, 16, 15, 2, 16, 14),
    "several-blocks-of-keys": (1, 24, 22, 1, 40, 0),
    "odd-head-dim": (1, 5, 7, 2, 13, 0),
    "rows-longer-than-a-block": (1, 2, 540, 1, 8, 0),
    "head-dim-128": (1, 9, 8, 1, 128, 0),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_matches_reference(
    instruction_set: str, sizes: Case, dtype: torch.dtype
) -> None:
    inputs = make_inputs(*sizes)
    checks.check_matches_reference(operator_of(sizes), inputs, "cpu", dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_matches_reference_at_any_size(data: st.DataObject) -> None:
    side = st.integers(1, 12)
    sizes = (
        data.draw(st.integers(1, 2)),
        data.draw(side),
        data.draw(side),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(0, 7)),
    )
    inputs = make_inputs(*sizes, torch.float32)
    options = (sizes[3], sizes[5], data.draw(st.sampled_from(["bias", "mask"])))
    found = libraries.load("cpu").rel_pos_attention(*inputs.values(), *options, "")
    wanted = reference.forward(Inputs(*(x.double() for x in inputs.values()), *options))
    for name, got, exact in zip(("output", "log_sum_exp"), found, wanted, strict=True):
        checks.assert_close(name, got, exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 20, 20, 1, 8, 0), (2, 9, 9, 3, 16, 4)], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(sizes: Case, dtype: torch.dtype) -> None:
    """Few heads are cut into parts for many threads, so that the first case runs differently."""
    inputs = make_inputs(*sizes, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(checks.run(operator_of(sizes), inputs, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert all(torch.equal(results[1][1][name], value) for name, value in results[0][1].items())


def test_calls_leave_nothing_behind(library: Any) -> None:
    """Torch's conversion of a string argument leaves 48 bytes of it behind, which no memory of frames can bear."""
    sizes = (1, 6, 5, 2, 8, 4)
    inputs = make_inputs(*sizes, torch.float32)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    bad = [*inputs.values(), 2, 4, "zero", ""]

    def forward_and_backward() -> None:
        torch.autograd.grad(operator_of(sizes)(**leaves).sum(), list(leaves.values()))

    def fail() -> None:
        with pytest.raises(RuntimeError, match="pad_mode"):
            library.rel_pos_attention(*bad)

    assert bytes_left_by(lambda: operator_of(sizes)(**inputs, backend="cpu")) < 16
    assert bytes_left_by(forward_and_backward) < 16
    assert bytes_left_by(fail) < 16


def test_nan_stays_visible(instruction_set: str) -> None:
    """A query that is NaN spoils its own output, in every head channel, and no other query's."""
    sizes = (1, 4, 5, 1, 8, 0)
    inputs = make_inputs(*sizes, torch.float32)
    inputs["qkv"][0, 1, 2, :8] = float("nan")
    out = operator_of(sizes)(**inputs, backend="cpu")
    assert out[0, 1, 2].isnan().all()
    assert out.isnan().sum() == 8


def test_window_much_larger_than_the_grid_needs_no_memory_of_its_size() -> None:
    """Keys of a window of this side would take gigabytes; without padding there are six."""
    inputs = make_inputs(1, 2, 3, 1, 8, 6000, torch.float32)
    out = operator_of((1, 2, 3, 1, 8, 6000), "mask")(**inputs, backend="cpu")
    middle = (slice(5999 - 1, 5999 + 2), slice(5999 - 2, 5999 + 3))
    tables = (inputs["rel_pos_h"][middle[0]], inputs["rel_pos_w"][middle[1]])
    wanted = rel_pos_attention(inputs["qkv"], *tables, num_heads=1, backend="cpu")
    torch.testing.assert_close(out, wanted)


@pytest.mark.slow  # asks for 9 GB of memory, of which it touches a few pages
def test_large_strides_are_read_without_overflow() -> None:
    """Rows so far apart that their distance in elements does not fit 32 bits."""
    stride = 2**31 + 7
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    qkv = storage.as_strided((1, 3, 2, 24), (0, stride, 24, 1))
    dense = torch.randn(1, 3, 2, 24).bfloat16()
    qkv.copy_(dense)
    tables = (torch.randn(5, 8).bfloat16(), torch.randn(3, 8).bfloat16())
    out, far = (rel_pos_attention(x, *tables, num_heads=1, backend="cpu") for x in (dense, qkv))
    assert torch.equal(out, far)


def test_what_it_cannot_compute_falls_back() -> None:
    """Named, it says why it cannot; not named, another backend computes it."""
    for sizes, dtype, reason in (
        ((1, 2, 2, 1, 8, 0), torch.float16, "computes float32, bfloat16, got float16"),
        ((1, 2, 2, 1, 1025, 0), torch.float32, "takes at most 1024 channels in a head, got 1025"),
    ):
        inputs = make_inputs(*sizes, dtype)
        with pytest.raises(BackendError, match=reason):
            operator_of(sizes)(**inputs, backend="cpu")
        assert operator_of(sizes)(**inputs).shape == (1, 2, 2, sizes[4])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"qkv": torch.zeros(9, 9, 48)}, "qkv: got 3 dimensions, wanted 4"),
    "dtype": ({"qkv": torch.zeros(1, 9, 9, 48).half()}, "rel_pos_h: got dtype Float, wanted Half"),
    "no-rows": ({"qkv": torch.zeros(1, 0, 9, 48)}, "qkv's height: got 0, wanted 1 to"),
    "strides": ({"qkv": torch.zeros(1, 9, 9, 96)[..., ::2]}, "qkv: got stride 2 of the last dimension, wanted 1"),
    "channels": ({"qkv": torch.zeros(1, 9, 9, 50)}, "qkv: got 50 channels, wanted a multiple of 3 * num_heads = 6"),
    "heads": ({"num_heads": 0}, "num_heads: got 0, wanted 1 to 48"),
    "table": ({"rel_pos_h": torch.zeros(9, 8)}, "rel_pos_h: got 9 x 8, wanted 7 x 8"),
    "table-dtype": ({"rel_pos_w": torch.zeros(7, 8).double()}, "rel_pos_w: got dtype Double, wanted Float"),
    "table-strides": ({"rel_pos_w": torch.zeros(8, 7).T}, "rel_pos_w: got strides of a view"),
    "bias": ({"qkv_bias": torch.zeros(47)}, "qkv_bias: got 47 numbers, wanted 48"),
    "window": ({"window_size": 2**40}, "window_size: got 1099511627776, wanted 0 to"),
    "pad-mode": ({"pad_mode": "zero"}, "pad_mode: got 'zero', wanted bias, mask or none"),
    "does-not-fit": ({"pad_mode": "none"}, "window_size: got 4, wanted a divisor of the grid"),
    "instruction-set": ({"instruction_set": "sse"}, "instruction_set: got sse, wanted avx512bf16, avx512vnni"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_library_names_the_argument_that_fails(
    library: Any, change: dict[str, Any], message: str
) -> None:
    """Straight into C++, past the checks of the public function."""
    arguments: dict[str, Any] = {
        "qkv": torch.zeros(1, 9, 9, 48),
        "rel_pos_h": torch.zeros(7, 8),
        "rel_pos_w": torch.zeros(7, 8),
        "qkv_bias": None,
        "num_heads": 2,
        "window_size": 4,
        "pad_mode": "bias",
        "instruction_set": "",
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        library.rel_pos_attention(*(arguments | change).values())


BAD_BACKWARD: dict[str, tuple[dict[str, Any], str]] = {
    "grad-shape": ({"grad_out": torch.zeros(1, 9, 9, 15)}, "grad_out: wanted shape (1, 9, 9, 16)"),
    "grad-dtype": ({"grad_out": torch.zeros(1, 9, 9, 16).double()}, "grad_out: got dtype Double, wanted Float"),
    "out-strides": ({"out": torch.zeros(1, 9, 9, 32)[..., ::2]}, "out: got strides of a view"),
    "statistic": ({"log_sum_exp": torch.zeros(1, 9, 9, 2)}, "log_sum_exp: wanted shape (1, 2, 9, 9)"),
    "statistic-rank": ({"log_sum_exp": torch.zeros(1, 9, 9)}, "log_sum_exp: got 3 dimensions, wanted 4"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_BACKWARD.values(), ids=BAD_BACKWARD)
def test_library_names_the_argument_of_the_backward_that_fails(
    library: Any, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "grad_out": torch.zeros(1, 9, 9, 16),
        "qkv": torch.zeros(1, 9, 9, 48),
        "rel_pos_h": torch.zeros(7, 8),
        "rel_pos_w": torch.zeros(7, 8),
        "qkv_bias": None,
        "out": torch.zeros(1, 9, 9, 16),
        "log_sum_exp": torch.zeros(1, 2, 9, 9),
        "num_heads": 2,
        "window_size": 4,
        "pad_mode": "bias",
        "needs_tables": True,
        "instruction_set": "",
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        library.rel_pos_attention_backward(*(arguments | change).values())
