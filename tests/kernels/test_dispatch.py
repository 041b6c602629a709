"""How a backend is chosen, on an operator made for the test, and how the operator behaves around it."""

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from refsam_kernels import BackendError, use_backend
from refsam_kernels.core.checks import autocast_dtype
from refsam_kernels.core.dispatch import Dispatcher, parse_request, requested_backend
from refsam_kernels.core.gradients import gradients_by_vjp
from refsam_kernels.core.registration import Operator, needs_gradient

PACKAGE = "operator_of_test_dispatch"
NAME = "scaled_product"


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: float


def formula(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    return x * weight * scale


class Trace(list[str]):
    """The calls that ran, as "direction backend"."""


TRACE = Trace()


def make_backend(name: str, **members: Any) -> ModuleType:
    """A backend module of the test's operator that records that it ran."""
    module = ModuleType(f"{PACKAGE}.{name}")

    def forward(inputs: Inputs) -> Tensor:
        TRACE.append(f"forward {name}")
        return formula(*inputs)

    def backward(
        inputs: Inputs, outputs: None, grads: list[Tensor], needs: list[bool]
    ) -> tuple[Tensor, ...]:
        TRACE.append(f"backward {name}")
        *tensors, scale = inputs
        return gradients_by_vjp(lambda *pair: formula(*pair, scale), tensors, needs, grads)

    module.__dict__.update({"forward": forward, "backward": backward, **members})
    return module


def register() -> tuple[Operator, Any]:
    """Registers the test's operator as docs/design.md says and returns it with its forward."""
    operator = Operator(NAME, Inputs, package=PACKAGE)

    @operator.forward
    def run(inputs: Inputs) -> Tensor:
        return torch.empty_like(inputs.x)

    operator.differentiate({"grad": "out"})
    return operator, run


@pytest.fixture(scope="module")
def registered() -> Iterator[tuple[Operator, Any]]:
    yield register()
    del Dispatcher.known[NAME]


@pytest.fixture
def backends(
    registered: tuple[Operator, Any], monkeypatch: pytest.MonkeyPatch
) -> dict[str, ModuleType | str]:
    """The operator's backends, by name, which a test may change; at first fallback and reference."""
    monkeypatch.delenv("REFSAM_BACKEND", raising=False)
    dispatcher = registered[0].dispatcher
    modules: dict[str, Any] = {name: make_backend(name) for name in ("fallback", "reference")}
    monkeypatch.setattr(dispatcher, "_modules", modules)
    monkeypatch.setattr(dispatcher, "exists", lambda name: name in modules)
    monkeypatch.setattr(dispatcher, "_logged", set())
    TRACE.clear()
    return modules


@pytest.fixture
def run(registered: tuple[Operator, Any], backends: dict[str, Any]) -> Any:
    """The operator on fixed tensors that require gradients; returns what ran."""

    def call(backend: str = "", backward: bool = False) -> list[str]:
        TRACE.clear()
        x, weight = (torch.arange(3.0).requires_grad_() for _ in range(2))
        result = registered[1](x, weight, 2.0, backend)
        torch.testing.assert_close(result, 2 * x * weight)
        if backward:
            result.sum().backward()
            torch.testing.assert_close(x.grad, 2 * weight)
            torch.testing.assert_close(weight.grad, 2 * x)
        return list(TRACE)

    return call


def test_automatic_choice_is_never_the_reference(run: Any, backends: dict[str, Any]) -> None:
    assert run(backward=True) == ["forward fallback", "backward fallback"]
    refuse = {"not_supported_reasons": lambda *_: ["too large"]}
    backends["fallback"] = make_backend("fallback", **refuse)
    with pytest.raises(BackendError, match="no backend can run: fallback: too large"):
        run()
    del backends["fallback"]
    with pytest.raises(BackendError, match="no backend can run: it has none"):
        run()


def test_faster_backends_come_first(run: Any, backends: dict[str, Any]) -> None:
    backends["cpu"] = make_backend("cpu")
    backends["cuda"] = make_backend("cuda")
    assert run(backward=True) == ["forward cpu", "backward cpu"]


def test_precedence(run: Any, monkeypatch: pytest.MonkeyPatch, backends: dict[str, Any]) -> None:
    backends["cpu"] = make_backend("cpu")
    monkeypatch.setenv("REFSAM_BACKEND", "fallback")
    assert run() == ["forward fallback"]
    with use_backend("reference"):
        assert run() == ["forward reference"]
        assert run("cpu") == ["forward cpu"]
    assert run() == ["forward fallback"]


def test_inner_block_goes_first_for_what_it_names(backends: dict[str, Any]) -> None:
    with use_backend("fallback"), use_backend(f"{NAME}=reference"):
        assert requested_backend(NAME) == "reference"
        assert requested_backend("mask_loss") == "fallback"


def test_environment_names_operators(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setenv("REFSAM_BACKEND", f"mask_loss=triton, {NAME}=reference")
    assert run() == ["forward reference"]
    assert requested_backend("mask_upscale") == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tritn", r"REFSAM_BACKEND: got the backend 'tritn', wanted one of triton, cuda, cpu"),
        (
            "mask_los=triton",
            r"REFSAM_BACKEND: got the operator 'mask_los', wanted one of .*mask_lo",
        ),
        ("mask_loss=", r"REFSAM_BACKEND: got the backend '', wanted one of"),
    ],
)
def test_unknown_names_are_errors(
    text: str, message: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFSAM_BACKEND", text)
    with pytest.raises(BackendError, match=message):
        run()


def test_unknown_argument_and_block_are_errors(run: Any) -> None:
    with pytest.raises(BackendError, match="backend: got the backend 'fast', wanted one of"):
        run("fast")
    with pytest.raises(BackendError, match="use_backend: got the backend 'fast'"):
        use_backend("fast").__enter__()


def test_error_by_name_gives_every_reason(run: Any, backends: dict[str, Any]) -> None:
    reasons = ["the head dimension is 7", "the moon is full"]
    backends["cpu"] = make_backend("cpu", not_supported_reasons=lambda *_: reasons)
    with pytest.raises(BackendError, match="'cpu' cannot run: the head dimension is 7; the moon"):
        run("cpu")
    with pytest.raises(BackendError, match="cannot run: scaled_product has no triton backend"):
        run("triton")
    backends["cuda"] = make_backend("cuda")
    with pytest.raises(BackendError, match="cannot run: needs cuda tensors, got cpu"):
        run("cuda")


def test_falls_back_and_logs_once(
    run: Any, backends: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    backends["cpu"] = make_backend("cpu", not_supported_reasons=lambda *_: ["too small"])
    backends["cuda"] = make_backend("cuda")
    with caplog.at_level(logging.INFO, logger="refsam_kernels"):
        assert run() == ["forward fallback"]
        assert run() == ["forward fallback"]
    messages = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert messages == [("WARNING", "scaled_product falls back from cpu: too small")]


def test_backend_that_cannot_be_imported_is_passed_over(
    run: Any, backends: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    backends["cpu"] = "cannot be imported: _C_cpu.so was not built"
    with caplog.at_level(logging.INFO, logger="refsam_kernels"):
        assert run() == ["forward fallback"]
    assert [record.levelname for record in caplog.records] == ["INFO"]
    with pytest.raises(BackendError, match=r"_C_cpu\.so was not built"):
        run("cpu")


def test_backend_without_backward_leaves_it_to_the_next(
    run: Any, backends: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    backends["cpu"] = make_backend("cpu")
    del backends["cpu"].backward
    assert run(backward=True) == ["forward cpu", "backward fallback"]
    assert run("cpu", backward=True) == ["forward cpu", "backward fallback"]
    assert not caplog.records
    backends["cpu"] = "cannot be imported: _C_cpu.so was not built"
    with pytest.raises(BackendError, match=r"_C_cpu\.so was not built"):
        run("cpu", backward=True)


def test_backward_has_reasons_of_its_own(run: Any, backends: dict[str, Any]) -> None:
    refuse = {"backward_not_supported_reasons": lambda *_: ["not these"]}
    backends["cpu"] = make_backend("cpu", **refuse)
    assert run(backward=True) == ["forward cpu", "backward fallback"]


def test_backward_keeps_to_the_block_of_its_forward(
    registered: tuple[Operator, Any], backends: dict[str, Any]
) -> None:
    """After the block, and on a thread that has never seen it, as CUDA's backward."""
    x = torch.ones(3, requires_grad=True)
    with use_backend("reference"):
        result = registered[1](x, x, 1.0, "")
    thread = threading.Thread(target=result.sum().backward)
    thread.start()
    thread.join()
    assert TRACE == ["forward reference", "backward reference"]


def test_block_belongs_to_its_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend("mask_loss")))
        thread.start()
        thread.join()
    assert seen == [""]


def test_package_that_is_missing_is_a_reason(
    registered: tuple[Operator, Any], backends: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends["triton"] = make_backend("triton")
    monkeypatch.setattr("refsam_kernels.core.dispatch.is_installed", lambda _: False)
    dispatcher = registered[0].dispatcher
    assert dispatcher.environment_reasons("triton", "cuda") == ["triton is not installed"]


def test_triton_serves_the_cpu_in_its_interpreter_only(
    registered: tuple[Operator, Any], backends: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends["triton"] = make_backend("triton")
    monkeypatch.setattr("refsam_kernels.core.dispatch.is_installed", lambda _: True)
    dispatcher = registered[0].dispatcher
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatcher.environment_reasons("triton", "cpu") == ["needs cuda tensors, got cpu"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatcher.environment_reasons("triton", "cpu") == []


def test_request_is_read_item_by_item() -> None:
    assert parse_request(" fallback , mask_loss=cpu,", "test") == {
        "": "fallback",
        "mask_loss": "cpu",
    }


def test_autocast_is_off_inside(run: Any, backends: dict[str, Any]) -> None:
    def product(inputs: Inputs) -> Tensor:
        assert (inputs.x[None] @ inputs.weight[:, None]).dtype == torch.float32
        return formula(*inputs)

    backends["fallback"] = make_backend("fallback", forward=product)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run()


def test_backward_from_a_formula_survives_dispatch_modes(run: Any) -> None:
    """Under a mode `torch.func.vjp` fails inside a custom operator."""
    with FlopCounterMode(display=False):
        assert run(backward=True) == ["forward fallback", "backward fallback"]


def test_gradients_by_vjp_skips_and_owns() -> None:
    x, y, grad = (torch.randn(3) for _ in range(3))

    def outside_autograd(*needs: bool) -> tuple[Tensor | None, ...]:
        return gradients_by_vjp(lambda a, b: (a + b, a), (x, y), needs, (grad,))

    found = [tensor for tensor in outside_autograd(True, True) if tensor is not None]
    assert [tensor.tolist() for tensor in found] == [grad.tolist()] * 2
    assert len({tensor.data_ptr() for tensor in (*found, grad)}) == 3
    assert [tensor is None for tensor in outside_autograd(False, True)] == [True, False]
    assert outside_autograd(False, False) == (None, None)


def test_gradients_get_the_shape_and_dtype_of_their_tensors(
    registered: tuple[Operator, Any], backends: dict[str, Any]
) -> None:
    """A backend may return them in another shape, dtype and layout, and None or anything where none is needed."""

    def backward(
        inputs: Inputs, outputs: None, grads: list[Tensor], needs: list[bool]
    ) -> tuple[Tensor | None, ...]:
        assert needs == [True, False]
        return (grads[0] * inputs.weight * inputs.scale).double().T.contiguous().T.flatten(), None

    backends["fallback"] = make_backend("fallback", backward=backward)
    x, weight = torch.ones(2, 3, requires_grad=True), torch.arange(6.0).view(2, 3)
    registered[1](x, weight, 2.0, "").sum().backward()
    assert x.grad is not None and x.grad.is_contiguous()
    torch.testing.assert_close(x.grad, 2 * weight)


def test_second_derivative_raises(registered: tuple[Operator, Any], backends: Any) -> None:
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        registered[1](x, x, 1.0, "").square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="scaled_product: second derivatives are not supported"):
        gradient.sum().backward()


def test_needs_gradient() -> None:
    plain, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert needs_gradient(plain, None, leaf)
    assert not needs_gradient(plain, None)
    with torch.no_grad():
        assert not needs_gradient(leaf)


def test_triton_is_not_imported_unless_wanted(root: Path) -> None:
    """Nor is torch._dynamo, which would take seconds: torch's own `custom_op` imports both."""
    code = """
import os, sys, torch
from refsam_kernels import rel_pos_attention
for request in ("", "fallback", "reference", "mask_loss=triton"):
    os.environ["REFSAM_BACKEND"] = request
    qkv = torch.randn(1, 2, 2, 12, requires_grad=True)
    rel_pos_attention(qkv, torch.randn(3, 4), torch.randn(3, 4), num_heads=1).sum().backward()
print([name for name in sys.modules if name.startswith(("triton", "torch._dynamo"))])
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root / "kernels"), "PATH": ""},
        check=True,
    )
    assert result.stdout == "[]\n"
    assert result.stderr == ""


def test_nothing_is_asked_that_an_older_dynamo_cannot_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dynamo of torch 2.10 and 2.11 refuses this question, newer ones trace it: `make test-oldest` sees the rest."""

    def refuse(*_: object) -> None:
        raise AssertionError("torch.amp.is_autocast_available cannot be traced by torch 2.11")

    for owner in (torch.amp, torch):
        monkeypatch.setattr(owner, "is_autocast_available", refuse, raising=False)
    assert autocast_dtype(torch.device("cpu")) is None
    assert autocast_dtype(torch.device("meta")) is None
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(torch.device("cpu")) == torch.bfloat16
