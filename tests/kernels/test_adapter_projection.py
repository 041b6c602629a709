"""adapter_projection: the explicit backward against the formula, an untrained adapter, frozen weights, mixed dtypes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels import AdapterWeights, adapter_projection
from refsam_kernels.feed_forward import mlp
from tests.kernels import operator_checks as checks

BACKENDS = ["reference", "fallback"]
LINEAR = ("weight", "bias")
ADAPTER = tuple(f"adapter_{layer}_{kind}" for layer in ("fc1", "fc2") for kind in LINEAR)
NORM = ("norm_weight", "norm_bias")
SIZES = {  # leading dimensions, width, hidden width of the adapter
    "grid": ((2, 5, 3), 24, 6),
    "odd": ((1, 7, 9), 63, 15),
    "one-token": ((1,), 8, 2),
}


def make_inputs(leading: tuple[int, ...], width: int, hidden: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(42)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "attention": normal(*leading, width),
        "residual": normal(*leading, width, size=3.0),
        "weight": normal(width, width, size=width**-0.5),
        "bias": normal(width),
        "adapter_fc1_weight": normal(hidden, width, size=width**-0.5),
        "adapter_fc1_bias": normal(hidden),
        "adapter_fc2_weight": normal(width, hidden, size=hidden**-0.5),
        "adapter_fc2_bias": normal(width),
        "norm_weight": 1 + normal(width, size=0.1),
        "norm_bias": normal(width, size=0.1),
    }


def operator(
    attention: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    backend: str | None = None,
    eps: float = 1e-6,
    **adapter: Tensor,
) -> tuple[Tensor, Tensor]:
    """adapter_projection on tensors by name."""
    weights = AdapterWeights(*(adapter[name] for name in ADAPTER)) if adapter else None
    norm = (norm_weight, norm_bias)
    return adapter_projection(
        attention, residual, weight, bias, weights, *norm, eps=eps, backend=backend
    )


def bare(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs without an adapter."""
    return {name: tensor for name, tensor in inputs.items() if name not in ADAPTER}


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs(*SIZES["grid"])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "bare"])
def test_fallback_matches_reference(
    adapter: bool, dtype: torch.dtype, sizes: tuple[Any, ...]
) -> None:
    inputs = make_inputs(*sizes)
    checks.check_matches_reference(operator, inputs if adapter else bare(inputs), "fallback", dtype)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "bare"])
def test_reference_is_the_formula(adapter: bool, inputs: dict[str, Tensor]) -> None:
    """Written out with torch's modules."""

    def linear(prefix: str) -> nn.Linear:
        weight = inputs[f"{prefix}weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight, layer.bias = (nn.Parameter(inputs[f"{prefix}{kind}"]) for kind in LINEAR)
        return layer

    norm = nn.LayerNorm(24, eps=1e-6)
    norm.weight, norm.bias = (nn.Parameter(inputs[name]) for name in NORM)
    y = linear("")(inputs["attention"])
    if adapter:
        y = y + linear("adapter_fc2_")(nn.functional.gelu(linear("adapter_fc1_")(y)))
    x = inputs["residual"] + y
    found = operator(**(inputs if adapter else bare(inputs)), backend="reference")
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
        inputs["attention"].requires_grad_(gradients)
        with_adapter = operator(**inputs, backend=backend)
        without = operator(**bare(inputs), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(with_adapter, without, strict=True))


def test_eps_is_used(inputs: dict[str, Tensor]) -> None:
    x, normed = operator(**inputs, eps=0.5)
    norm = [inputs[name] for name in NORM]
    torch.testing.assert_close(normed, nn.functional.layer_norm(x, (24,), *norm, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_change_no_other_gradient(backend: str, inputs: dict[str, Tensor]) -> None:
    """As in training: everything but the adapter is frozen, and below the first one nothing is trained."""
    _, every = checks.run(operator, inputs, backend)
    for frozen in (LINEAR + NORM, (*LINEAR, *NORM, "attention", "residual")):
        _, found = checks.run(operator, inputs, backend, frozen=frozen)
        assert found.keys() == inputs.keys() - set(frozen)
        assert all(torch.equal(found[name], every[name]) for name in found)


def test_each_gradient_alone(inputs: dict[str, Tensor]) -> None:
    checks.check_single_gradients(operator, inputs, "fallback")


@pytest.mark.parametrize("most", [30 * 6, 30 * 6 - 1], ids=["small", "large"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_for_the_backward(
    backend: str, most: int, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing without one; of a large adapter not the GELU's result, which changes no gradient."""
    monkeypatch.setattr(mlp, "MOST_KEPT", most)
    run = torch.ops.refsam_kernels.adapter_projection
    kept = run(*inputs.values(), 1e-6, False, backend)[2:]
    assert [x.shape for x in kept] == [(0,)] * 5
    kept = run(*inputs.values(), 1e-6, True, backend)[2:]
    row, activated = (2, 5, 3, 1), (2, 5, 3, 6) if most == 30 * 6 else (0,)
    assert [x.shape for x in kept] == [row, row, (2, 5, 3, 24), (2, 5, 3, 6), activated]
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
    names, tensors = zip(*make_inputs((2,), 4, 3).items(), strict=True)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return operator(**dict(zip(names, values, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_does_not_matter(backend: str, inputs: dict[str, Tensor]) -> None:
    wanted = operator(**inputs, backend=backend)
    channels_first = {
        name: inputs[name].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        for name in ("attention", "residual")
    }
    found = operator(**(inputs | channels_first), backend=backend)
    assert all(result.is_contiguous() for result in found)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend: str, inputs: dict[str, Tensor]) -> None:
    checks.check_repeats(operator, checks.cast(inputs, torch.float32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    outputs, gradients = checks.run(operator, make_inputs((0, 3, 5), 8, 2), backend)
    assert [tuple(output.shape) for output in outputs] == [(0, 3, 5, 8)] * 2
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = checks.cast(make_inputs((2, 3), 8, 2), torch.float32)
    run = torch.ops.refsam_kernels.adapter_projection.default
    checks.check_schema_and_fakes(run, (*inputs.values(), 1e-6, True, backend))
    tensors = tuple(None if name in ADAPTER else tensor for name, tensor in inputs.items())
    checks.check_schema_and_fakes(run, (*tensors, 1e-6, True, backend))


def test_opcheck_of_the_backward() -> None:
    inputs = list(checks.cast(make_inputs((2, 3), 8, 2), torch.float32).values())
    x, normed, *saved = torch.ops.refsam_kernels.adapter_projection(*inputs, 1e-6, True, "")
    backward = torch.ops.refsam_kernels.adapter_projection_backward.default
    for needs in ([True] * 10, [True, True] + [False] * 8):
        arguments = (x, normed, *inputs, x, *saved, 1e-6, needs, "fallback")
        torch.library.opcheck(backward, arguments)


def test_compiles_into_one_graph(inputs: dict[str, Tensor]) -> None:
    checks.check_compiles(operator, inputs, "fallback")


def test_checkpoint_and_second_derivative(inputs: dict[str, Tensor]) -> None:
    checks.check_checkpoint(operator, inputs, "fallback")
    checks.check_second_derivative_raises(operator, inputs, "attention")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"attention": torch.zeros(24)}, r"attention: got shape \(24,\), wanted \(\.\.\., D\)"),
    "residual": ({"residual": torch.zeros(2, 5, 24)}, r"residual: got shape \(2, 5, 24\), wanted \(2, 5, 3, 24\)"),
    "weight": ({"weight": torch.zeros(24, 25)}, r"weight: got shape \(24, 25\), wanted \(24, 24\)"),
    "bias": ({"bias": torch.zeros(25)}, r"bias: got shape \(25,\), wanted \(24\)"),
    "adapter": ({"adapter_fc2_weight": torch.zeros(24, 7)}, r"adapter\.fc2_weight: got shape \(24, 7\), wanted \(24, 6\)"),
    "dtype": ({"adapter_fc2_bias": torch.zeros(24).half()}, r"adapter\.fc2_bias: got torch.float16, wanted torch.float64"),
    "norm": ({"norm_weight": torch.zeros(23)}, r"norm_weight: got shape \(23,\), wanted \(24\)"),
    "norm-dtype": ({"norm_bias": torch.zeros(24).half()}, "norm_bias: got torch.float16, wanted torch.float64 as the sum"),
    "device": ({"residual": torch.zeros(2, 5, 3, 24, device="meta")}, "residual: got meta, wanted cpu as attention"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(inputs: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operator(**(inputs | change))
