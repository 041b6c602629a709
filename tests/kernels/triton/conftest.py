"""These tests run in Triton's interpreter (`tests/kernels/test_triton.py` starts it) or, like every test marked gpu, on a GPU."""

import pytest

from tests.kernels.interpreter import IS_INTERPRETED


def pytest_itemcollected(item: pytest.Item) -> None:
    """Outside the interpreter they need a GPU."""
    if not IS_INTERPRETED:
        item.add_marker(pytest.mark.gpu)
