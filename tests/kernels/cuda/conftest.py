"""These tests run in the emulator (`tests/kernels/test_cuda.py` starts it) or, like every test marked gpu, on a GPU."""

import pytest

from tests.kernels.emulator import IS_EMULATED


def pytest_itemcollected(item: pytest.Item) -> None:
    """Outside the emulator they need a GPU."""
    if not IS_EMULATED:
        item.add_marker(pytest.mark.gpu)
