"""Available cores, and the number of threads to use."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Multiplications with the image encoder's weights for one frame: nano has 0.7e9, ViT-B 350e9.
_SMALL_MODEL = 4e9
_MOST_THREADS_OF_SMALL = 4


def available_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_threads(device: "torch.device", multiplications: float) -> None:
    """Let torch compute with few threads for a small model on the CPU, unless OMP_NUM_THREADS says how many.

    Threads that share small products wait for each other at every product, and reading and writing frames needs a core
    too. A large model keeps all cores.

    Args:
        device: where the model is.
        multiplications: with the image encoder's weights, for one frame (`ImageEncoderConfig.multiplications`).
    """
    import torch

    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    if multiplications < _SMALL_MODEL:
        torch.set_num_threads(max(1, min(available_cores() - 1, _MOST_THREADS_OF_SMALL)))


@contextmanager
def chosen_threads(device: "torch.device", multiplications: float) -> Iterator[None]:
    """`choose_threads` within the block; the previous number is restored afterwards."""
    import torch

    before = torch.get_num_threads()
    choose_threads(device, multiplications)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless OMP_WAIT_POLICY says otherwise.

    Decoder, encoder and torch share the cores, and threads that spin while they wait keep the others off them: on two
    busy cores a frame took 300 times as long. OpenMP reads this when torch is first imported; later it has no effect.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
