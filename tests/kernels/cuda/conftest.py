"""These tests run in the emulator (`tests/kernels/test_cuda.py` starts it) or, like every test marked gpu, on a GPU."""

from collections.abc import Iterator

import pytest
import torch

from refsam_kernels.core import libraries
from tests.kernels.emulator import IS_EMULATED


def pytest_itemcollected(item: pytest.Item) -> None:
    """Outside the emulator they need a GPU."""
    if not IS_EMULATED:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def library_is_built() -> None:
    """A GPU alone does not suffice."""
    try:
        libraries.load("cuda")
    except ImportError as reason:
        pytest.skip(f"gpu: {reason}")


@pytest.fixture(autouse=True)
def poison_memory_of_libraries() -> Iterator[None]:
    """PyTorch fills memory that a library asks for too, integers included: what a kernel does not write cannot pass."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")
