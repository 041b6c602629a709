"""Shared by the tests of the kernels: memory that the library does not write shows."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels.core import libraries

# Their assertions are to explain themselves like those of a test file.
pytest.register_assert_rewrite(
    "tests.kernels.adapter_cases",
    "tests.kernels.backend_cases",
    "tests.kernels.dense_attention_cases",
    "tests.kernels.mask_loss_cases",
    "tests.kernels.mask_postprocess_cases",
    "tests.kernels.mask_upscale_cases",
    "tests.kernels.rel_pos_attention_cases",
    "tests.kernels.token_image_attention_cases",
)


def poisoned(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`create`, but with NaN in floating point tensors that code of the library asks for."""

    def create_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = create(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        is_library = caller.split(".")[0] == "refsam_kernels"
        return tensor.fill_(float("nan")) if is_library and tensor.is_floating_point() else tensor

    return create_poisoned


@pytest.fixture(autouse=True)
def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills uninitialised tensors of the library with NaN: an output that is not written cannot pass."""
    # torch remembers for good what its factory functions are when a device is first made the default: let it be its own.
    with torch.device("cpu"):
        torch.empty(())
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(
    params=[
        "fallback",
        "portable",
        "avx2",
        "avxvnni",
        "avx512vl",
        "avx512",
        "avx512vnni",
        "avx512bf16",
    ]
)
def int8_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fallback, or an instruction set for 8-bit integers that the processor has: it is made to run."""
    if request.param == "fallback":
        monkeypatch.setenv("REFSAM_BACKEND", "fallback")
        return request.param
    try:
        libraries.load("cpu").multiplies_int8(request.param)
    except (ImportError, RuntimeError) as reason:
        pytest.skip(str(reason).splitlines()[0])
    monkeypatch.setenv("REFSAM_BACKEND", "cpu")
    monkeypatch.setenv("REFSAM_CPU_INSTRUCTION_SET", request.param)
    return request.param
