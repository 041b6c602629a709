"""int8_linear and int8_mlp: exact integers, every instruction set, values that are not finite, and torch's tools."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from refsam_kernels import (
    BackendError,
    Int8Weights,
    flop_formulas,
    int8_linear,
    int8_mlp,
    quantise_weights,
)
from refsam_kernels.core import libraries
from refsam_kernels.int8_linear import reference
from refsam_kernels.int8_linear.weights import unpack
from tests.kernels import operator_checks as checks

STEPS = {"avx2": 127, "avx512": 127}  # of a row; 255 elsewhere
SIZES = {"odd": (7, 5, 3), "several blocks": (50, 37, 70), "one row": (1, 64, 16), "wide": (13, 130, 81)}  # fmt: skip


@pytest.fixture
def steps(int8_backend: str) -> int:
    """How many steps a row is cut into by the backend and instruction set that are made to run."""
    return STEPS.get(int8_backend, 255)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def layer(out_channels: int, in_channels: int, seed: int = 1) -> Int8Weights:
    weight = normal(out_channels, in_channels, seed=seed) / in_channels**0.5
    return quantise_weights(weight.float(), normal(out_channels, seed=seed + 1).float())


def dequantised(weights: Int8Weights) -> Tensor:
    integers = unpack(weights.packed, weights.in_channels, weights.out_channels)
    return integers.double() * weights.scale[: weights.out_channels, None].double()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_integers_are_exact(steps: int, sizes: tuple[int, int, int]) -> None:
    """Rows from -low to steps - low have steps of 1, weights that reach 127 a scale of 1: no rounding is left."""
    rows, in_channels, out_channels = sizes
    low = 40
    x = whole(-low, steps - low, rows, in_channels)
    x[:, 0], x[:, -1] = -low, steps - low
    weight = whole(-127, 127, out_channels, in_channels, seed=1)
    weight[:, 0] = 127
    bias = whole(-1000, 1000, out_channels, seed=2)
    wanted = x @ weight.T + bias
    found = int8_linear(x.float(), quantise_weights(weight.float(), bias.float()))
    assert wanted.abs().max() < 2**24
    assert torch.equal(found, wanted.float())


def test_sums_fit_at_the_largest_values(steps: int) -> None:
    channels = 4096
    x, weight = torch.full((2, channels), 1.0), torch.full((16, channels), 1.0)
    weight[8:] = -1
    found = int8_linear(x, quantise_weights(weight))
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_that_of_the_steps(
    steps: int, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """A value is off by half a step at most, so a sum by half a step times the weights' sizes."""
    rows, in_channels, out_channels = sizes
    x, weights = normal(rows, in_channels).to(dtype), layer(out_channels, in_channels)
    norm = (1 + 0.1 * normal(in_channels, seed=3).float(), normal(in_channels, seed=4).float())
    residual = normal(rows, out_channels, seed=5).to(dtype)
    found = int8_linear(x, weights, norm=norm, residual=residual)
    normed = F.layer_norm(x.double(), (in_channels,), *(t.double() for t in norm), 1e-6)
    weight = dequantised(weights)
    exact = normed @ weight.T + weights.bias[:out_channels].double() + residual.double()
    step = (normed.amax(-1).clamp(min=0) - normed.amin(-1).clamp(max=0)) / steps
    bound = 0.5001 * step[:, None] * weight.abs().sum(-1)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps * exact.abs() + 1e-5
    assert bool(((found.double() - exact).abs() <= bound + rounding).all())


def test_mlp_is_near_the_float_one(steps: int) -> None:
    x, first, second = normal(60, 48).float(), layer(100, 48), layer(48, 100, seed=3)
    norm = (torch.ones(48), torch.zeros(48))
    found = int8_mlp(x, first, second, norm=norm, residual=x).double()
    hidden = F.gelu(F.linear(F.layer_norm(x, (48,)).double(), dequantised(first), first.bias[:100].double()))  # fmt: skip
    exact = F.linear(hidden, dequantised(second), second.bias[:48].double())
    error = (found - x.double() - exact).norm() / exact.norm()
    assert error < 3.0 / steps


def test_instruction_sets_agree_with_the_reference(steps: int) -> None:
    """At most a rounding of a step's number apart: in one value of a thousand, by one step."""
    x, weights = normal(40, 64).float(), layer(48, 64)
    if steps != reference.LARGEST:
        pytest.skip("the reference has 255 steps")
    found, wanted = int8_linear(x, weights), int8_linear(x, weights, backend="reference")
    assert (found - wanted).norm() <= 3e-4 * wanted.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_where_they_are(steps: int, value: float) -> None:
    x, first, second = normal(20, 19).float(), layer(33, 19), layer(19, 33, seed=3)
    clean = int8_mlp(x, first, second, residual=x), int8_linear(x, first)
    x[7, 18] = value
    hit = int8_mlp(x, first, second, residual=x), int8_linear(x, first)
    for before, after in zip(clean, hit, strict=True):
        assert not after[7].isfinite().any()
        rest = torch.arange(20) != 7
        assert torch.equal(before[rest], after[rest])


def test_rows_of_zeros_and_of_hardly_more_give_the_bias(steps: int) -> None:
    weights = layer(9, 12)
    for size in (0.0, 1e-40):
        found = int8_linear(torch.full((3, 12), size), weights)
        assert torch.equal(found, weights.bias[:9].expand(3, 9))


def test_large_values_do_not_overflow_the_range(steps: int) -> None:
    weights = quantise_weights(torch.eye(3) / 4)
    found = int8_linear(torch.tensor([[3e38, -3e38, 0.0]]), weights)
    torch.testing.assert_close(found, torch.tensor([[3e38, -3e38, 0.0]]) / 4, rtol=0.01, atol=0)


def test_layouts_give_the_same(steps: int) -> None:
    weights = layer(21, 16)
    x = normal(3, 10, 16).float()
    wanted = int8_linear(x, weights)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., :16]
    for view in (x.mT.contiguous().mT, wide, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(int8_linear(view, weights), wanted)
    assert int8_linear(x[:, :0], weights).shape == (3, 0, 21)
    assert torch.equal(int8_linear(x[0, 0], weights), wanted[0, 0])


def test_threads_do_not_change_a_bit(steps: int) -> None:
    x, first, second = normal(101, 24).float(), layer(40, 24), layer(24, 40, seed=3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [int8_mlp(x, first, second), int8_mlp(x, first, second)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_weights_of_zeros_and_without_bias() -> None:
    weights = quantise_weights(torch.zeros(5, 6))
    assert torch.equal(int8_linear(torch.ones(2, 6), weights), torch.zeros(2, 5))


def test_the_largest_weight_is_exact_and_others_within_half_a_step() -> None:
    weight = normal(20, 30).float()
    found = dequantised(quantise_weights(weight))
    step = weight.abs().amax(1, keepdim=True).double() / 127
    assert bool(((found - weight.double()).abs() <= 0.5001 * step).all())
    largest = weight.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(found.gather(1, largest), weight.double().gather(1, largest))


def test_opcheck() -> None:
    x, first, second = normal(4, 8).float(), layer(6, 8), layer(8, 6, seed=3)
    norm = (torch.ones(8), torch.zeros(8))
    operator = torch.ops.refsam_kernels.int8_linear.default
    none = (None,) * 4
    one = (x, *first.tensors, *none, None, None, None, 8, 0, 6, 1e-6, False, "")
    two = (x, *first.tensors, *second.tensors, *norm, x, 8, 6, 8, 1e-6, False, "")
    half = (x.bfloat16(), *first.tensors, *none, None, None, None, 8, 0, 6, 1e-6, True, "")
    for arguments in (one, two, half):
        torch.library.opcheck(operator, arguments)


@pytest.mark.slow
def test_is_one_node_of_a_graph() -> None:
    first, second = layer(6, 8), layer(8, 6, seed=3)

    def function(x: Tensor) -> Tensor:
        return int8_mlp(int8_linear(x, second._replace()) if x.shape[-1] == 6 else x, first, second, residual=x)  # fmt: skip

    x = normal(5, 8).float()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), function(x))


def test_autograd_is_refused() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(
        RuntimeError, match="int8_linear: got tensors that require gradients, wanted a call under"
    ):
        int8_linear(x, layer(6, 8))  # fmt: skip
    with torch.no_grad():
        int8_linear(x, layer(6, 8))


X = torch.ones(2, 8)
WRONG: dict[str, tuple[Any, str]] = {
    "width": (lambda: int8_linear(torch.ones(2, 7), layer(6, 8)), r"x: got shape \(2, 7\), wanted \(\.\.\., 8\)"),
    "float16": (lambda: int8_linear(X.half(), layer(6, 8)), "dtype: got torch.float16, wanted torch.float32 or"),
    "float64": (lambda: int8_linear(X.double(), layer(6, 8), dtype=torch.float32), "x: got torch.float64"),
    "integers": (lambda: int8_linear(X.int(), layer(6, 8), dtype=torch.float32), "x: got torch.int32"),
    "residual": (lambda: int8_linear(X, layer(6, 8), residual=X), r"residual: got shape \(2, 8\), wanted \(2, 6\)"),
    "residual-dtype": (lambda: int8_linear(X, layer(8, 8), residual=X.bfloat16()), "residual: got torch.bfloat16"),
    "norm": (lambda: int8_linear(X, layer(6, 8), norm=(torch.ones(7), torch.ones(8))), r"norm\[0\]: got shape"),
    "mlp": (lambda: int8_mlp(X, layer(6, 8), layer(8, 7)), "second: got 7 input channels, wanted 6"),
    "weight-shape": (lambda: quantise_weights(torch.ones(3)), "weight: got shape"),
    "weight-empty": (lambda: quantise_weights(torch.ones(0, 3)), "weight: got shape"),
    "weight-wide": (lambda: quantise_weights(torch.ones(1, 65537)), "weight: got shape"),
    "weight-nan": (lambda: quantise_weights(torch.tensor([[float("nan")]])), "weight: got NaN or infinity"),
    "weight-dtype": (lambda: quantise_weights(torch.ones(3, 3).int()), "weight: got torch.int32"),
    "bias": (lambda: quantise_weights(torch.ones(3, 3), torch.ones(2)), "bias: got shape"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        libraries.load("cpu")
    except ImportError as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv("REFSAM_CPU_INSTRUCTION_SET", "sse")
    with pytest.raises(
        RuntimeError, match="instruction_set: got sse, wanted avx512bf16, avx512vnni"
    ):
        int8_linear(X, layer(6, 8))


def test_no_backend_of_another_device() -> None:
    with pytest.raises(BackendError):
        int8_linear(X, layer(6, 8), backend="triton")
    assert checks.outputs_of(int8_linear(X, layer(6, 8)))


def test_products_are_counted() -> None:
    layers = [quantise_weights(normal(*shape).float()) for shape in ((6, 4), (4, 6))]
    x = normal(2, 3, 4).float()
    for call, wanted in (
        (lambda: int8_linear(x, layers[0], backend="fallback"), 2 * 6 * 4 * 6),
        (lambda: int8_mlp(x, *layers, backend="fallback"), 2 * 6 * 6 * (4 + 4)),
    ):
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            call()
        assert counter.get_total_flops() == wanted
