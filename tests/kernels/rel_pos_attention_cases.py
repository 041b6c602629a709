"""Tests that every backend of rel_pos_attention must pass; each test file compares results in sizes of its own besides.

A test file makes a class of them per backend, or per kernel of a backend.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels import rel_pos_attention
from refsam_kernels.rel_pos_attention import reference
from refsam_kernels.rel_pos_attention.inputs import Inputs
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import on_device, slow_in_interpreter

Case = tuple[int, int, int, int, int, int]  # images, height, width, heads, head dim, window


def make_inputs(
    images: int,
    height: int,
    width: int,
    heads: int,
    head_dim: int,
    window: int,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Tensors by name, of the size that they have in SAM's checkpoints."""
    generator = torch.Generator().manual_seed(42)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "qkv": normal(images, height, width, 3 * heads * head_dim),
        "rel_pos_h": 0.3 * normal(2 * (window or height) - 1, head_dim),
        "rel_pos_w": 0.3 * normal(2 * (window or width) - 1, head_dim),
        "qkv_bias": normal(3 * heads * head_dim),
    }


def operator_of(case: Case, pad_mode: str = "bias") -> checks.Operator:
    return partial(rel_pos_attention, num_heads=case[3], window_size=case[5], pad_mode=pad_mode)


class RelPosAttentionCases:
    """Needs a small case whose last window has padding, and the finest dtype that the backend computes in."""

    backend: str
    case: Case
    dtype = torch.float32
    autocast_dtype = torch.bfloat16
    log_sum_exp_error = 1e-6
    device = "cpu"

    @property
    def operator(self) -> checks.Operator:
        return on_device(operator_of(self.case), self.device)

    @property
    def model_dtype(self) -> torch.dtype:
        """The finest dtype that models are in."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return make_inputs(*self.case, dtype=dtype or self.dtype)

    def run(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        return checks.run(self.operator, inputs, self.backend, **options)

    @slow_in_interpreter
    def test_missing_bias_is_zero(self) -> None:
        inputs = self.inputs()
        zero = {**inputs, "qkv_bias": torch.zeros_like(inputs.pop("qkv_bias"))}
        found, wanted = self.run(inputs), self.run(zero)
        torch.testing.assert_close(found[0], wanted[0])
        for name, gradient in found[1].items():
            torch.testing.assert_close(gradient, wanted[1][name])

    def test_frozen_tables_change_no_other_gradient(self) -> None:
        """dq has the relative part all the same: without it, it would be wrong by its own size."""
        _, every = self.run(self.inputs())
        _, found = self.run(self.inputs(), frozen=("rel_pos_h", "rel_pos_w"))
        assert found.keys() == {"qkv", "qkv_bias"}
        assert all(torch.equal(found[name], every[name]) for name in found)

    @slow_in_interpreter
    def test_each_gradient_alone(self) -> None:
        checks.check_single_gradients(self.operator, self.inputs(), self.backend)

    @slow_in_interpreter
    @pytest.mark.parametrize(
        "layout", ["slice", "odd-slice", "permuted", "every-second-image", "expanded"]
    )
    def test_layout_of_qkv_does_not_matter(self, layout: str) -> None:
        inputs = make_inputs(2, *self.case[1:], dtype=self.dtype)
        qkv = inputs["qkv"].to(self.device)
        if layout == "slice":
            qkv = F.pad(qkv, (8, 16, 1, 0), value=float("nan"))[:, :, 1:, 8:-16]
        elif layout == "odd-slice":
            qkv = F.pad(qkv, (5, 2, 1, 0), value=float("nan"))[:, :, 1:, 5:-2]
        elif layout == "permuted":
            qkv = qkv.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        elif layout == "every-second-image":
            qkv = qkv.repeat_interleave(2, 0)[::2]
        else:
            qkv = qkv[:1].expand(2, -1, -1, -1)
        assert not qkv.is_contiguous()
        found = self.operator(**inputs | {"qkv": qkv}, backend=self.backend)
        wanted = self.operator(**inputs | {"qkv": qkv.contiguous()}, backend=self.backend)
        torch.testing.assert_close(found, wanted)

    @slow_in_interpreter
    @pytest.mark.parametrize("layout", checks.LAYOUTS.values(), ids=checks.LAYOUTS)
    def test_any_layout(self, layout: Callable[[Tensor], Tensor]) -> None:
        checks.check_layout(self.operator, self.inputs(), self.backend, layout)

    def test_forward_mode_raises(self) -> None:
        checks.check_forward_mode_raises(self.operator, self.inputs(), self.backend)

    @slow_in_interpreter
    @pytest.mark.parametrize("size", [0.0, 5.0], ids=["equal", "up-to-80"])
    def test_extreme_logits(self, size: float) -> None:
        inputs = make_inputs(*self.case)
        width = inputs["qkv"].shape[-1]
        inputs["qkv"][..., : 2 * width // 3] *= size
        checks.check_matches_reference(self.operator, inputs, self.backend, self.model_dtype)

    def test_log_sum_exp_means_the_same_everywhere(self) -> None:
        images, height, width, heads, _, window = self.case
        tensors = list(self.inputs(self.model_dtype).values())
        forward = torch.ops.refsam_kernels.rel_pos_attention
        on_its_device = (tensor.to(self.device) for tensor in tensors)
        saved = forward(*on_its_device, heads, window, "bias", self.backend)[1].cpu()
        exact = reference.forward(
            Inputs(*(x.double() for x in tensors), heads, window, "bias")
        ).log_sum_exp
        assert saved.shape == (images, heads, height, width)
        assert saved.dtype == torch.float32
        checks.assert_close("log_sum_exp", saved, exact, self.log_sum_exp_error)

    def test_repeats_bitwise_also_within_a_batch(self) -> None:
        inputs = self.inputs(self.model_dtype)
        checks.check_repeats(self.operator, inputs, self.backend)
        inputs["qkv"] = inputs["qkv"][:1].repeat(2, 1, 1, 1)
        first, second = self.operator(**inputs, backend=self.backend)
        assert torch.equal(first, second)

    def test_empty_batch(self) -> None:
        _, height, width, heads, head_dim, _ = self.case
        outputs, gradients = self.run(make_inputs(0, *self.case[1:], dtype=self.dtype))
        assert outputs[0].shape == (0, height, width, heads * head_dim)
        assert not any(gradient.any() for gradient in gradients.values())

    @slow_in_interpreter
    def test_opcheck(self) -> None:
        heads, window = self.case[3], self.case[5]
        inputs = self.inputs(self.model_dtype)
        qkv, *tables, bias = (tensor.to(self.device) for tensor in inputs.values())
        operator = torch.ops.refsam_kernels.rel_pos_attention.default
        for last, mode in ((bias, "bias"), (None, "mask")):
            arguments = (qkv, *tables, last, heads, window, mode, self.backend)
            checks.check_schema_and_fakes(operator, arguments)

    def test_autocast_casts_the_operands(self) -> None:
        inputs = self.inputs(torch.float32)

        def under_autocast(**arguments: Any) -> Tensor:
            with torch.autocast(self.device, dtype=self.autocast_dtype):
                return self.operator(**arguments)

        outputs, gradients = checks.run(under_autocast, inputs, self.backend)
        lowered = self.run(checks.cast(inputs, self.autocast_dtype))
        assert outputs[0].dtype == self.autocast_dtype
        assert torch.equal(outputs[0], lowered[0][0])
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, lowered[1][name].float())
