"""The order of backends on a GPU: rules with their evidence, and what float32 means there."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels.core import libraries, order, triton_aot
from refsam_kernels.core.dispatch import BACKENDS, Dispatcher
from refsam_kernels.core.order import RULES, order_of
from refsam_kernels.mask_postprocess.inputs import Inputs

NAMES = tuple(BACKENDS)
PRODUCTS = [rule.operator for rule in RULES if rule.exact]


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def call(dtype: torch.dtype, window: int = 0) -> tuple[Any, ...]:
    return torch.zeros(1, dtype=dtype).as_subclass(OnGpu), 12, window, "bias"


def first(operator: str, dtype: torch.dtype, function: str = "forward", window: int = 0) -> str:
    """The backend that an operator's call asks first, among those that it has."""
    dispatcher, arguments = Dispatcher.known[operator], call(dtype, window)
    found = order_of(operator, function, arguments, NAMES)
    return next(name for name in found if dispatcher.exists(name))


@pytest.mark.parametrize("operator", PRODUCTS)
def test_exact_float32_goes_to_cublas(operator: str) -> None:
    assert first(operator, torch.float32) == "fallback"
    assert first(operator, torch.bfloat16) == "triton"


@pytest.mark.parametrize("operator", PRODUCTS)
def test_float32_with_tf32_goes_to_tensor_cores(operator: str, tf32: None) -> None:
    assert first(operator, torch.float32) == "triton"


def test_windows_forward_goes_to_cuda() -> None:
    assert first("rel_pos_attention", torch.bfloat16, window=14) == "cuda"
    assert first("rel_pos_attention", torch.bfloat16, window=0) == "triton"
    assert first("rel_pos_attention", torch.bfloat16, "backward", window=14) == "triton"


@pytest.mark.parametrize("function", ["bits", "runs"])
def test_packed_masks_go_to_cuda(function: str) -> None:
    assert first("mask_postprocess", torch.float32, function) == "cuda"
    assert first("mask_postprocess", torch.float32) == "triton"


def test_every_cuda_backend_can_be_reached() -> None:
    """Where Triton is missing, at the latest."""
    for operator, dispatcher in Dispatcher.known.items():
        if dispatcher.exists("cuda") and dispatcher.exists("triton"):
            found = order_of(operator, "forward", call(torch.bfloat16), NAMES)
            assert found.index("cuda") < found.index("fallback")


def test_every_rule_names_what_there_is_and_why() -> None:
    for rule in RULES:
        assert rule.operator in Dispatcher.known
        assert set(rule.first) <= set(BACKENDS)
        assert rule.evidence.startswith(("expected, not measured: ", "benchmarks/results/"))


def test_off_a_gpu_nothing_changes() -> None:
    arguments = (torch.zeros(1), 12, 14, "bias")
    assert order_of("rel_pos_attention", "forward", arguments, NAMES) == list(NAMES)


def test_the_newer_setting_of_tf32_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Matmul:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("mixed settings")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    assert order.allows_tf32()


class Kernel:
    """Remembers the options of a launch."""

    options: dict[str, Any]

    def __getitem__(self, programs: tuple[int, ...]) -> Any:
        return lambda **options: setattr(self, "options", options)


def test_a_launch_multiplies_float32_as_torch_is_told(tf32: None) -> None:
    kernel = Kernel()
    triton_aot.Launch(kernel, (1,), {}).run()
    assert kernel.options["default_dot_input_precision"] == "tf32"
    torch.set_float32_matmul_precision("highest")
    triton_aot.Launch(kernel, (1,), {}).run()
    assert kernel.options["default_dot_input_precision"] == "ieee"


def test_a_library_that_is_there_and_cannot_be_loaded_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_C_cpu.so").write_bytes(b"not a library")
    monkeypatch.setenv("REFSAM_LIBRARIES", str(tmp_path))
    monkeypatch.delitem(sys.modules, "refsam_kernels.mask_postprocess.cpu", raising=False)
    libraries.load.cache_clear()
    dispatcher = Dispatcher("of_this_test", Inputs, package="refsam_kernels.mask_postprocess")
    inputs = Inputs(torch.zeros(1, 1, 1), 1, (1, 1), (1, 1), 0.0)
    try:
        with caplog.at_level(logging.INFO, logger="refsam_kernels"):
            assert dispatcher.choose("forward", (inputs,)) == "fallback"
    finally:
        del Dispatcher.known["of_this_test"]
        libraries.load.cache_clear()
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "from cpu: cannot be imported" in warnings[0].getMessage()
