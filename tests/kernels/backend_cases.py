"""Tests that every backend of a differentiable operator must pass; `<operator>_cases.py` adds those of its operator.

A test file makes a class per backend, of `TorchCases`, `TritonCases` or `CudaCases` and of its operator's cases.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError
from tests.kernels import emulator, interpreter
from tests.kernels import operator_checks as checks

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
Size = tuple[Any, ...]  # what the operator's `make_inputs` takes


class BackendCases:
    """Needs sizes of inputs; a test that asks for a `size`, a `dtype` or a `half` precision runs for the class's."""

    backend: str
    device: str
    dtypes: list[torch.dtype]
    sizes: Mapping[str, Size]
    small: Size
    frozen: tuple[tuple[str, ...], ...]
    function: checks.Operator

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "size" in metafunc.fixturenames:
            metafunc.parametrize("size", self.sizes.values(), ids=self.sizes)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)
        if "half" in metafunc.fixturenames:
            halves = [dtype for dtype in self.dtypes if dtype.itemsize == 2]
            metafunc.parametrize("half", halves, ids=str)

    def operator_of(self, size: Size) -> checks.Operator:
        """The operator for inputs of the size on the CPU, computed on the device."""
        return interpreter.on_device(self.function, self.device)

    @property
    def operator(self) -> checks.Operator:
        return self.operator_of(self.small)

    def make_inputs(self, size: Size) -> dict[str, Tensor]:
        """Tensors by name, in float64."""
        raise NotImplementedError

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return checks.cast(self.make_inputs(self.small), dtype)

    def run(self, inputs: checks.Inputs, frozen: tuple[str, ...] = ()) -> Any:
        return checks.run(self.operator, inputs, self.backend, frozen)

    def test_matches_reference(self, size: Size, dtype: torch.dtype) -> None:
        inputs = self.make_inputs(size)
        checks.check_matches_reference(self.operator_of(size), inputs, self.backend, dtype)

    def test_repeats_bitwise(self, dtype: torch.dtype) -> None:
        checks.check_repeats(self.operator, self.inputs(dtype), self.backend)

    @interpreter.slow_in_interpreter
    def test_each_gradient_alone(self) -> None:
        checks.check_single_gradients(self.operator, self.inputs(), self.backend)

    def test_frozen_inputs_change_no_other_gradient(self) -> None:
        _, every = self.run(self.inputs())
        for frozen in self.frozen:
            _, found = self.run(self.inputs(), frozen)
            assert found.keys() == every.keys() - set(frozen)
            assert all(torch.equal(found[name], every[name]) for name in found)

    @pytest.mark.parametrize("layout", checks.LAYOUTS.values(), ids=checks.LAYOUTS)
    def test_any_layout(self, layout: Callable[[Tensor], Tensor]) -> None:
        checks.check_layout(self.operator, self.inputs(), self.backend, layout)

    def test_forward_mode_raises(self) -> None:
        checks.check_forward_mode_raises(self.operator, self.inputs(), self.backend)

    def test_checkpoint(self) -> None:
        checks.check_checkpoint(self.operator, self.inputs(), self.backend)

    def test_compiles_into_one_graph(self) -> None:
        checks.check_compiles(self.operator, self.inputs(), self.backend)


class TorchCases(BackendCases):
    """In PyTorch, on the CPU."""

    device = "cpu"
    dtypes = DTYPES


class KernelCases(BackendCases):
    """Needs what is refused, and why."""

    refused: Mapping[str, tuple[Size, torch.dtype, str]]

    def test_refuses_what_it_cannot_compute(self) -> None:
        for size, dtype, reason in self.refused.values():
            inputs = checks.cast(self.make_inputs(size), dtype)
            with pytest.raises(BackendError, match=reason):
                self.operator_of(size)(**inputs, backend=self.backend)


class TritonCases(KernelCases):
    """In Triton's interpreter, or on a GPU."""

    backend = "triton"
    device = interpreter.DEVICE
    dtypes = interpreter.DTYPES


class CudaCases(KernelCases):
    """In the emulator, or on a GPU."""

    backend = "cuda"
    device = emulator.DEVICE
    dtypes = emulator.DTYPES

    def test_inference_gives_the_bits_of_training(self, dtype: torch.dtype) -> None:
        inputs = self.inputs(dtype)
        for tensor in inputs.values():
            tensor.requires_grad_(tensor.is_floating_point())
        with torch.no_grad():
            found = self.operator(**inputs, backend=self.backend)
        trained, _ = self.run(self.inputs(dtype))
        assert all(map(torch.equal, checks.outputs_of(found), trained))

    @pytest.mark.slow
    def test_compiles_into_one_graph(self) -> None:
        super().test_compiles_into_one_graph()

    def test_memory_that_is_not_aligned(self) -> None:
        inputs = self.inputs(torch.float16)
        views = {
            name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
            for name, x in inputs.items()
        }
        found, expected = (self.operator(**x, backend=self.backend) for x in (views, inputs))
        assert all(map(torch.equal, checks.outputs_of(found), checks.outputs_of(expected)))
