"""These tests run in the emulator (`tests/kernels/test_cuda.py` starts it) or, like every test marked gpu, on a GPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.emulator import IS_EMULATED


def pytest_itemcollected(item: pytest.Item) -> None:
    """Outside the emulator they need a GPU."""
    if not IS_EMULATED:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def poison_memory_of_libraries() -> Iterator[None]:
    """PyTorch fills memory that a library asks for too, integers included: what a kernel does not write cannot pass."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")
