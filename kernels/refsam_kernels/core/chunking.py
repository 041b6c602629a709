"""Work in chunks: intermediate results stay in a CPU's cache, and memory does not grow with the number of expressions."""

from collections.abc import Iterator

import torch

ELEMENTS_ON_CPU = 2**18
ELEMENTS_ELSEWHERE = 2**23


def chunks(count: int, elements_each: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` items of `elements_each` elements; a slice has about as many elements as suit the device."""
    elements = ELEMENTS_ON_CPU if device.type == "cpu" else ELEMENTS_ELSEWHERE
    size = max(1, elements // elements_each)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
