"""How many cores this process may use, and how many threads it takes."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Multiplications with the image encoder's weights for one frame: nano has 0.7e9, ViT-B 350e9.
_SMALL_MODEL = 4e9
_MOST_THREADS_OF_SMALL = 4


def available_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_threads(device: "torch.device", multiplications: float) -> None:
    """Let torch compute with few threads for a small model on the CPU, unless OMP_NUM_THREADS says how many.

    Threads that share small products wait for each other at each of them, and whatever reads and writes the
    frames meanwhile needs a core too. A large model keeps all cores.

    Args:
        device: where the model is.
        multiplications: with the image encoder's weights, for one frame (`ImageEncoderConfig.multiplications`).
    """
    import torch

    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    if multiplications < _SMALL_MODEL:
        torch.set_num_threads(max(1, min(available_cores() - 1, _MOST_THREADS_OF_SMALL)))
