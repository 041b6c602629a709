"""rel_pos_attention: every backend against the formula, the formula against segment-anything and the augmented form.

Tests of all backends are in `rel_pos_attention_cases`.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refsam_kernels import rel_pos_attention
from refsam_kernels.core import libraries
from refsam_kernels.rel_pos_attention import fallback, windows
from refsam_kernels.rel_pos_attention.inputs import Inputs
from refsam_kernels.rel_pos_attention.window_groups import window_groups
from tests.kernels import operator_checks as checks
from tests.kernels.rel_pos_attention_cases import RelPosAttentionCases, make_inputs, operator_of
from tests.sam_modeling import load_sam_modeling, randomise


def why_not_compiled() -> str:
    """Why the compiled backend cannot be tested here, or ""."""
    try:
        libraries.load("cpu")
    except ImportError as reason:
        return str(reason)
    return ""


COMPILED = pytest.param(
    "cpu", marks=pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled())
)
ARRANGED = ["fallback", COMPILED]
DTYPES = [
    *(pytest.param("fallback", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    *(
        pytest.param("cpu", dtype, marks=COMPILED.marks)
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
BACKENDS = ["reference", *ARRANGED]
# The dtype in which a backend is compared to find mistakes, and its roundings in that dtype.
EXACT = {"reference": torch.float64, "fallback": torch.float64, "cpu": torch.float32}
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-6}
CASES = {  # images, height, width, heads, head dim, window
    "window4-of-13x9": (2, 13, 9, 3, 16, 4),
    "window4-of-10x10": (1, 10, 10, 2, 64, 4),
    "window4-of-8x12": (1, 8, 12, 2, 16, 4),
    "window14-of-14x14": (1, 14, 14, 1, 80, 14),
    "window14-of-16x16": (1, 16, 16, 2, 16, 14),
    "window14-of-5x6": (2, 5, 6, 2, 16, 14),
    "global-7x13": (1, 7, 13, 2, 80, 0),
    "global-10x10": (3, 10, 10, 1, 64, 0),
    "global-24x21": (1, 24, 21, 1, 8, 0),
    "global-3x20": (1, 3, 20, 1, 128, 0),
    "one-token": (1, 1, 1, 2, 20, 0),
}


class TestReference(RelPosAttentionCases):
    backend = "reference"
    case = CASES["window4-of-13x9"]
    dtype = torch.float64


class TestFallback(RelPosAttentionCases):
    backend = "fallback"
    case = CASES["window4-of-13x9"]
    dtype = torch.float64


@pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled())
class TestCpu(RelPosAttentionCases):
    backend = "cpu"
    case = CASES["window4-of-13x9"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("pad_mode", ["bias", "mask"])
@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
def test_matches_reference(
    case: tuple[int, ...], pad_mode: str, backend: str, dtype: torch.dtype
) -> None:
    # One key has the probability 1, whatever the tables say.
    zero = {"rel_pos_h": "qkv", "rel_pos_w": "qkv"} if case[1:3] == (1, 1) else {}
    operator = operator_of(case, pad_mode)
    checks.check_matches_reference(operator, make_inputs(*case), backend, dtype, zero=zero)


def test_float16() -> None:
    case = CASES["window4-of-13x9"]
    inputs = checks.cast(make_inputs(*case), torch.float16)
    outputs, gradients = checks.run(operator_of(case), inputs, "fallback")
    exact = checks.run(operator_of(case), checks.cast(inputs, torch.float64), "reference")
    checks.assert_close("output", outputs[0], exact[0][0], 4e-3)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float16
        checks.assert_close(name, gradient, exact[1][name], 1e-2)


@pytest.mark.parametrize("case", ["window4-of-13x9", "window14-of-5x6", "global-7x13"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_form_agrees(case: str, backend: str) -> None:
    """The decomposed bias is an exact factorisation: q' = [q*scale, q Rh, q Rw], k' = [k, one-hots]."""
    dtype = EXACT[backend]
    inputs = make_inputs(*CASES[case], dtype=dtype)
    wanted = checks.run(partial(one_hot_attention, case=CASES[case]), cast_up(inputs), "")
    found = checks.run(operator_of(CASES[case]), inputs, backend)
    checks.assert_close("output", found[0][0], wanted[0][0], ROUNDING[dtype])
    for name, gradient in found[1].items():
        checks.assert_close(name, gradient, wanted[1][name], ROUNDING[dtype])


def cast_up(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return checks.cast(inputs, torch.float64)


def one_hot_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    qkv_bias: Tensor,
    backend: str,
    case: tuple[int, ...],
) -> Tensor:
    """Window by window and head by head, by plain attention on widened queries and keys."""
    _, h, w, heads, head_dim, window = case
    size_h, size_w = window or h, window or w
    key_rows, key_columns = torch.cartesian_prod(torch.arange(size_h), torch.arange(size_w)).T
    one_hots = [F.one_hot(key_rows, size_h), F.one_hot(key_columns, size_w)]
    out = torch.zeros(*qkv.shape[:3], heads, head_dim, dtype=qkv.dtype)
    for image, top, left in torch.cartesian_prod(
        torch.arange(len(qkv)), torch.arange(0, h, size_h), torch.arange(0, w, size_w)
    ).tolist():
        real = (top + key_rows < h) & (left + key_columns < w)
        tokens = qkv_bias.expand(size_h * size_w, -1).clone()
        tokens[real] = qkv[image, top + key_rows[real], left + key_columns[real]]
        q, k, v = tokens.unflatten(-1, (3, heads, head_dim)).permute(1, 2, 0, 3)
        q, rows, columns = q[:, real], key_rows[real], key_columns[real]
        rel_h = rel_pos_h[rows[:, None] - torch.arange(size_h) + size_h - 1]
        rel_w = rel_pos_w[columns[:, None] - torch.arange(size_w) + size_w - 1]
        relative = [torch.einsum("gqc,qkc->gqk", q, rel) for rel in (rel_h, rel_w)]
        queries = torch.cat([q * head_dim**-0.5, *relative], -1)
        keys = torch.cat([k, *(one_hot.to(k).expand(heads, -1, -1) for one_hot in one_hots)], -1)
        attended = F.scaled_dot_product_attention(queries[None], keys[None], v[None], scale=1.0)
        out[image, top + rows, left + columns] = attended[0].transpose(0, 1)
    return out.flatten(3)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("grid", [(13, 9), (8, 8)])
def test_reference_is_segment_anything_to_the_bit(window: int, grid: tuple[int, int]) -> None:
    sam = load_sam_modeling().image_encoder
    size = (window, window) if window else grid
    attention = randomise(sam.Attention(48, num_heads=3, use_rel_pos=True, input_size=size))
    x = torch.randn(2, *grid, 48)
    if window:
        windows, padded = sam.window_partition(x, window)
        wanted = sam.window_unpartition(attention(windows), window, padded, grid)
    else:
        wanted = attention(x)
    attended = rel_pos_attention(
        attention.qkv(x),
        attention.rel_pos_h,
        attention.rel_pos_w,
        num_heads=3,
        window_size=window,
        qkv_bias=attention.qkv.bias,
        backend="reference",
    )
    assert torch.equal(attention.proj(attended), wanted)


def test_masked_padding_is_attention_within_the_crop() -> None:
    """With `mask`, the window that sticks out is a small grid of its own with the tables' middle rows."""
    inputs = make_inputs(*CASES["window4-of-13x9"])
    del inputs["qkv_bias"]
    whole = rel_pos_attention(**inputs, num_heads=3, window_size=4, pad_mode="mask")
    crop = rel_pos_attention(
        inputs["qkv"][:, 4:8, 8:], inputs["rel_pos_h"], inputs["rel_pos_w"][3:4], num_heads=3
    )
    torch.testing.assert_close(whole[:, 4:8, 8:], crop)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_windows_are_the_same_in_every_pad_mode(backend: str) -> None:
    case = CASES["window4-of-8x12"]
    inputs = make_inputs(*case, dtype=EXACT[backend])
    bias, mask, none = (
        checks.run(operator_of(case, mode), inputs, backend) for mode in ("bias", "mask", "none")
    )
    assert torch.equal(bias[0][0], mask[0][0])
    assert torch.equal(bias[0][0], none[0][0])
    assert not any(result[1]["qkv_bias"].any() for result in (bias, mask, none))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_of_another_length_are_interpolated(backend: str) -> None:
    case = CASES["global-7x13"]
    inputs = make_inputs(*case, dtype=EXACT[backend])
    table = torch.randn(27, 80, dtype=EXACT[backend])

    def resized_outside(rel_pos_h: Tensor, **others: Any) -> Tensor:
        resized = F.interpolate(rel_pos_h.T[None], size=13, mode="linear")[0].T
        return operator_of(case)(rel_pos_h=resized, **others)

    found = checks.run(operator_of(case), {**inputs, "rel_pos_h": table}, backend)
    wanted = checks.run(resized_outside, {**inputs, "rel_pos_h": table}, backend)
    torch.testing.assert_close(found, wanted)
    assert found[1]["rel_pos_h"].shape == (27, 80)


@pytest.mark.parametrize("size", [0.0, 5.0], ids=["equal", "up-to-80"])
@pytest.mark.parametrize("case", ["window4-of-10x10", "global-24x21"])
@pytest.mark.parametrize("backend", ARRANGED)
def test_extreme_logits_of_several_blocks(size: float, case: str, backend: str) -> None:
    inputs = make_inputs(*CASES[case])
    width = inputs["qkv"].shape[-1]
    inputs["qkv"][..., : 2 * width // 3] *= size
    checks.check_matches_reference(operator_of(CASES[case]), inputs, backend, torch.float32)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().size():
            self.elements = max(self.elements, result.untyped_storage().size() // 4)
        return result


def test_fallback_never_holds_many_scores() -> None:
    """On SAM's 64 x 64 grid a head alone has 16.8 million."""
    case = (1, 64, 64, 2, 4, 0)
    tensors = [tensor.float() for tensor in make_inputs(*case).values()]
    with LargestTensor() as largest:
        inputs = Inputs(*tensors, 2, 0, "bias")
        outputs = fallback.forward(inputs)
        fallback.backward(inputs, outputs, [outputs.out], [True] * 4)
    assert largest.elements <= max(windows.SCORES["cpu"], 2 * 64 * 64 * 64)


def test_parts_of_another_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (CASES["window4-of-13x9"], CASES["global-7x13"]):
        inputs = make_inputs(*case)
        whole = checks.run(operator_of(case), inputs, "fallback")
        monkeypatch.setitem(windows.SCORES, "cpu", 400)
        monkeypatch.setitem(fallback.QUERIES, "cpu", 1)  # one head at a time
        torch.testing.assert_close(checks.run(operator_of(case), inputs, "fallback"), whole)
        monkeypatch.undo()


@given(h=st.integers(1, 40), w=st.integers(1, 40), window=st.integers(0, 20))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_window_groups_tile_the_grid(h: int, w: int, window: int) -> None:
    """Every token is a query once, and only of windows that hold it."""
    grid = torch.zeros(1, h, w, 1, 1)
    found = list(window_groups(h, w, window, "bias"))
    for group in found:
        group.view(grid).add_(1)
        assert (group.key_height, group.key_width) == (window or h, window or w)
        assert group.height <= group.key_height
        assert group.width <= group.key_width
    assert torch.equal(grid, torch.ones_like(grid))
    assert len(found) <= 4


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("pad_mode", ["bias", "mask"])
def test_reference_gradients_are_the_derivatives(window: int, pad_mode: str) -> None:
    case = (1, 3, 3, 2, 2, window)
    names, tensors = zip(*make_inputs(*case).items(), strict=True)

    def function(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return operator_of(case, pad_mode)(**named, backend="reference")

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors])


def test_opcheck_of_the_backward() -> None:
    inputs = list(checks.cast(make_inputs(1, 5, 6, 2, 4, 4), torch.float32).values())
    saved = torch.ops.refsam_kernels.rel_pos_attention(*inputs, 2, 4, "bias", "")
    operator = torch.ops.refsam_kernels.rel_pos_attention_backward.default
    for needs in ([True] * 4, [True, False, False, False]):
        arguments = (saved[0], *inputs, *saved, 2, 4, "bias", needs, "fallback")
        torch.library.opcheck(operator, arguments)


def test_compiles_into_one_graph() -> None:
    case = (1, 6, 5, 2, 8, 4)
    checks.check_compiles(operator_of(case), make_inputs(*case), "fallback")


def test_checkpoint_and_second_derivative() -> None:
    case = (1, 6, 5, 2, 8, 4)
    checks.check_checkpoint(operator_of(case), make_inputs(*case), "fallback")
    checks.check_second_derivative_raises(operator_of(case), make_inputs(*case), "qkv")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"qkv": torch.zeros(9, 9, 48)}, r"qkv: got shape \(9, 9, 48\), wanted \(B, h, w, 3\*D\)"),
    "empty-grid": ({"qkv": torch.zeros(1, 0, 9, 48)}, r"qkv: got shape \(1, 0, 9, 48\), wanted a grid with tokens"),
    "width": ({"qkv": torch.zeros(1, 9, 9, 50)}, r"qkv: got shape \(1, 9, 9, 50\), wanted .* D a multiple of num_heads=2"),
    "heads": ({"num_heads": 0}, "num_heads: got 0, wanted a positive number"),
    "even-table": ({"rel_pos_h": torch.zeros(8, 8)}, r"rel_pos_h: got shape \(8, 8\), wanted \(odd length, 8\)"),
    "head-dim": ({"rel_pos_w": torch.zeros(7, 16)}, r"rel_pos_w: got shape \(7, 16\), wanted \(odd length, 8\)"),
    "bias": ({"qkv_bias": torch.zeros(16)}, r"qkv_bias: got shape \(16,\), wanted \(48,\)"),
    "window": ({"window_size": -1}, "window_size: got -1, wanted 0 for global attention, or the side"),
    "pad-mode": ({"pad_mode": "zero"}, "pad_mode: got 'zero', wanted one of bias, mask, none"),
    "does-not-fit": ({"pad_mode": "none"}, "window_size: got 4, wanted a divisor of the grid 9 x 9 with pad_mode 'none'"),
    "integers": ({"qkv": torch.zeros(1, 9, 9, 48).long()}, "qkv: got torch.int64, wanted a floating point dtype"),
    "dtype": ({"rel_pos_h": torch.zeros(7, 8).double()}, "rel_pos_h: got torch.float64, wanted torch.float32 as qkv"),
    "device": ({"rel_pos_w": torch.zeros(7, 8, device="meta")}, "rel_pos_w: got meta, wanted cpu as qkv"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(change: dict[str, Any], message: str) -> None:
    table = torch.zeros(7, 8)
    good = {"qkv": torch.zeros(1, 9, 9, 48), "rel_pos_h": table, "rel_pos_w": table}
    good |= {"num_heads": 2, "window_size": 4}
    with pytest.raises(ValueError, match=message):
        rel_pos_attention(**(good | change))
