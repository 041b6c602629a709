"""adapter_mlp: the explicit backward against the formula, an untrained adapter, frozen weights, mixed dtypes."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels import AdapterWeights, adapter_mlp
from refsam_kernels.feed_forward import mlp
from tests.kernels import operator_checks as checks

BACKENDS = ["reference", "fallback"]
MLP = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
ADAPTER = tuple(f"adapter_{name}" for name in MLP)
NORM = ("norm_weight", "norm_bias")
SIZES = {  # leading dimensions, width, hidden width of the MLP and of the adapter
    "grid": ((2, 5, 3), 24, 96, 6),
    "odd": ((1, 7, 9), 63, 127, 15),
    "one-token": ((1,), 8, 32, 2),
}


def make_inputs(
    leading: tuple[int, ...], width: int, hidden: int, adapter_hidden: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(42)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    def perceptron(names: tuple[str, ...], hidden: int) -> dict[str, Tensor]:
        shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
        return {
            name: normal(*shape, size=shape[-1] ** -0.5)
            for name, shape in zip(names, shapes, strict=True)
        }

    return {
        "normed": normal(*leading, width),
        "residual": normal(*leading, width, size=3.0),
        **perceptron(MLP, hidden),
        **perceptron(ADAPTER, adapter_hidden),
        "norm_weight": 1 + normal(width, size=0.1),
        "norm_bias": normal(width, size=0.1),
    }


def operator(
    normed: Tensor,
    residual: Tensor,
    backend: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    **weights: Tensor,
) -> tuple[Tensor, ...]:
    """adapter_mlp on tensors by name; what it does not return is left out."""
    mlp = (weights[name] for name in MLP)
    has_adapter = ADAPTER[0] in weights
    adapter = AdapterWeights(*(weights[name] for name in ADAPTER)) if has_adapter else None
    results = adapter_mlp(normed, residual, *mlp, adapter, norm_weight, norm_bias, backend=backend)
    return tuple(result for result in results if result is not None)


def without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name not in names}


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs(*SIZES["grid"])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "missing", [(), ADAPTER, NORM, ADAPTER + NORM], ids=["all", "no-adapter", "no-norm", "neither"]
)
def test_fallback_matches_reference(
    missing: tuple[str, ...], dtype: torch.dtype, sizes: tuple[Any, ...]
) -> None:
    inputs = without(make_inputs(*sizes), *missing)
    checks.check_matches_reference(operator, inputs, "fallback", dtype)


def test_reference_is_the_formula(inputs: dict[str, Tensor]) -> None:
    """Written out with torch's modules."""

    def perceptron(names: tuple[str, ...]) -> nn.Module:
        fc1, fc2 = (
            nn.Linear(24, inputs[names[0]].shape[0]),
            nn.Linear(inputs[names[0]].shape[0], 24),
        )
        values = [nn.Parameter(inputs[name]) for name in names]
        fc1.weight, fc1.bias, fc2.weight, fc2.bias = values
        return nn.Sequential(fc1, nn.GELU(), fc2)

    norm = nn.LayerNorm(24, eps=1e-6)
    norm.weight, norm.bias = (nn.Parameter(inputs[name]) for name in NORM)
    normed = inputs["normed"]
    x = inputs["residual"] + perceptron(MLP)(normed) + 0.5 * perceptron(ADAPTER)(normed)
    found = operator(**inputs, backend="reference")
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_untrained_adapter_changes_no_bit(
    backend: str, dtype: torch.dtype, inputs: dict[str, Tensor]
) -> None:
    for name in ("adapter_fc2_weight", "adapter_fc2_bias"):
        inputs[name].zero_()
    inputs = checks.cast(inputs, dtype)
    for gradients in (False, True):  # what is kept for the backward must not matter either
        inputs["normed"].requires_grad_(gradients)
        with_adapter = operator(**inputs, backend=backend)
        bare = operator(**without(inputs, *ADAPTER), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(with_adapter, bare, strict=True))


def test_scale_and_eps_are_used(inputs: dict[str, Tensor]) -> None:
    adapter = AdapterWeights(*(inputs[name] for name in ADAPTER))
    mlp = [inputs[name] for name in MLP]
    norm = [inputs[name] for name in NORM]
    call = partial(adapter_mlp, inputs["normed"], inputs["residual"], *mlp)
    bare, half, whole = (
        call(None, *norm)[0],
        call(adapter, *norm, scale=0.5)[0],
        call(adapter, *norm, scale=1.0)[0],
    )
    torch.testing.assert_close(2 * (half - bare), whole - bare)
    found = call(None, *norm, eps=0.5)[1]
    wanted = nn.functional.layer_norm(bare, (24,), *norm, 0.5)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_change_no_other_gradient(backend: str, inputs: dict[str, Tensor]) -> None:
    """As in training: everything but the adapters is frozen."""
    _, every = checks.run(operator, inputs, backend)
    _, found = checks.run(operator, inputs, backend, frozen=MLP + NORM)
    assert found.keys() == {"normed", "residual", *ADAPTER}
    assert all(torch.equal(found[name], every[name]) for name in found)


def test_each_gradient_alone(inputs: dict[str, Tensor]) -> None:
    checks.check_single_gradients(operator, inputs, "fallback")


@pytest.mark.parametrize("most", [30 * 96, 30 * 96 - 1], ids=["small", "large"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_for_the_backward(
    backend: str, most: int, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing without one; of a large MLP not the GELU's result, which changes no gradient."""
    monkeypatch.setattr(mlp, "MOST_KEPT", most)
    run = torch.ops.refsam_kernels.adapter_mlp
    kept = run(*inputs.values(), 0.5, 1e-6, False, backend)[2:]
    assert [x.shape for x in kept] == [(0,)] * 6
    kept = run(*inputs.values(), 0.5, 1e-6, True, backend)[2:]
    activated = (2, 5, 3, 96) if most == 30 * 96 else (0,)
    by_adapter = [(2, 5, 3, 6)] * 2
    row = (2, 5, 3, 1)
    assert [x.shape for x in kept] == [row, row, (2, 5, 3, 96), activated, *by_adapter]
    checks.check_matches_reference(operator, inputs, backend, torch.float64)
    checks.check_single_gradients(operator, inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [0, 1], ids=["x", "normed"])
def test_one_output_may_be_unused(output: int, backend: str, inputs: dict[str, Tensor]) -> None:
    def one_output(**arguments: Any) -> Tensor:
        return operator(**arguments)[output]

    checks.check_matches_reference(one_output, inputs, backend, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_residual_stream(backend: str, inputs: dict[str, Tensor]) -> None:
    inputs = checks.cast(inputs, torch.float32)

    def under_autocast(**arguments: Any) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return operator(**arguments)

    exact = checks.run(operator, checks.cast(inputs, torch.float64), "reference")
    (x, normed), gradients = checks.run(under_autocast, inputs, backend)
    assert (x.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    for name, found, wanted in (("x", x, exact[0][0]), ("normed", normed, exact[0][1])):
        checks.assert_close(name, found, wanted, 1e-2)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        checks.assert_close(name, gradient, exact[1][name], 3e-2)


def test_reference_gradients_are_the_derivatives() -> None:
    names, tensors = zip(*make_inputs((2,), 4, 5, 3).items(), strict=True)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return operator(**dict(zip(names, values, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_does_not_matter(backend: str, inputs: dict[str, Tensor]) -> None:
    wanted = checks.run(operator, inputs, backend)
    channels_first = {
        name: inputs[name].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        for name in ("normed", "residual")
    }
    found = operator(**(inputs | channels_first), backend=backend)
    assert all(result.is_contiguous() for result in found)
    torch.testing.assert_close(found, wanted[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend: str, inputs: dict[str, Tensor]) -> None:
    checks.check_repeats(operator, checks.cast(inputs, torch.float32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    inputs = make_inputs((0, 3, 5), 8, 16, 2)
    outputs, gradients = checks.run(operator, inputs, backend)
    assert [tuple(output.shape) for output in outputs] == [(0, 3, 5, 8)] * 2
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = checks.cast(make_inputs((2, 3), 8, 16, 2), torch.float32)
    run = torch.ops.refsam_kernels.adapter_mlp.default
    checks.check_schema_and_fakes(run, (*inputs.values(), 0.5, 1e-6, True, backend))
    bare = list(without(inputs, *ADAPTER, *NORM).values())
    checks.check_schema_and_fakes(run, (*bare, *[None] * 6, 0.5, 1e-6, True, backend))


def test_opcheck_of_the_backward() -> None:
    inputs = list(checks.cast(make_inputs((2, 3), 8, 16, 2), torch.float32).values())
    outputs = torch.ops.refsam_kernels.adapter_mlp(*inputs, 0.5, 1e-6, True, "")
    backward = torch.ops.refsam_kernels.adapter_mlp_backward.default
    x, normed, *saved = outputs
    for needs in ([True] * 12, [True, True] + [False] * 10):
        arguments = (x, normed, *inputs, x, *saved, 0.5, 1e-6, needs, "fallback")
        torch.library.opcheck(backward, arguments)


def test_compiles_into_one_graph(inputs: dict[str, Tensor]) -> None:
    checks.check_compiles(operator, inputs, "fallback")


def test_checkpoint_and_second_derivative(inputs: dict[str, Tensor]) -> None:
    checks.check_checkpoint(operator, inputs, "fallback")
    checks.check_second_derivative_raises(operator, inputs, "normed")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"normed": torch.zeros(24)}, r"normed: got shape \(24,\), wanted \(\.\.\., D\)"),
    "residual": ({"residual": torch.zeros(2, 5, 24)}, r"residual: got shape \(2, 5, 24\), wanted \(2, 5, 3, 24\)"),
    "fc1": ({"fc1_weight": torch.zeros(96, 25)}, r"fc1_weight: got shape \(96, 25\), wanted \(H, 24\)"),
    "fc2": ({"fc2_weight": torch.zeros(24, 95)}, r"fc2_weight: got shape \(24, 95\), wanted \(24, 96\)"),
    "adapter": ({"adapter_fc1_bias": torch.zeros(7)}, r"adapter\.fc1_bias: got shape \(7,\), wanted \(6\)"),
    "integers": ({"normed": torch.zeros(2, 5, 3, 24).long()}, "normed: got torch.int64, wanted a floating point dtype"),
    "dtype": ({"adapter_fc2_bias": torch.zeros(24).half()}, r"adapter\.fc2_bias: got torch.float16, wanted torch.float64"),
    "norm": ({"norm_weight": torch.zeros(23)}, r"norm_weight: got shape \(23,\), wanted \(24\)"),
    "norm-dtype": ({"norm_bias": torch.zeros(24).half()}, "norm_bias: got torch.float16, wanted torch.float64 as the sum"),
    "half-a-norm": ({"norm_bias": None}, "norm_bias: got one without the other, wanted both norm_weight and norm_bias or"),
    "device": ({"fc2_bias": torch.zeros(24, device="meta").double()}, "fc2_bias: got meta, wanted cpu as normed"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(inputs: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operator(**(inputs | change))
