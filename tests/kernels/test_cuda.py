"""CUDA kernels without a GPU: their tests in the emulator, and what the emulator itself must find."""

import pytest

from refsam_kernels.dispatch import Dispatcher
from tests.kernels.emulator import FOLDER, run_emulated

OPERATORS = sorted(
    name for name, dispatcher in Dispatcher.known.items() if dispatcher.exists("cuda")
)


@pytest.mark.parametrize("operator", OPERATORS)
def test_in_the_emulator(operator: str) -> None:
    assert (FOLDER / f"test_{operator}.py").is_file()
    run_emulated(operator)
