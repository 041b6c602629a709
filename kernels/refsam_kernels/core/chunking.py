"""Work in chunks: intermediate results stay in a CPU's cache, and memory does not grow with the number of expressions."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from refsam_kernels.core.gradients import gradients_by_vjp

ELEMENTS_ON_CPU = 2**18
ELEMENTS_ELSEWHERE = 2**23


def chunks(count: int, elements_each: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` items of `elements_each` elements; a slice has about as many elements as suit the device."""
    elements = ELEMENTS_ON_CPU if device.type == "cpu" else ELEMENTS_ELSEWHERE
    size = max(1, elements // elements_each)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def map_chunks(
    formula: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    split: Sequence[bool],
    slices: Sequence[slice],
) -> Tensor:
    """formula(*tensors), computed for the slices of the tensors marked in `split`, and joined."""
    if len(slices) <= 1:
        return formula(*tensors)
    return torch.cat([formula(*_take(tensors, split, part)) for part in slices])


def chunked_gradients(
    formula: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    split: Sequence[bool],
    slices: Sequence[slice],
    needs: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of `map_chunks`, as `gradients_by_vjp` returns them; of tensors that are not split, summed in a fixed order."""
    if len(slices) <= 1:
        return gradients_by_vjp(formula, tensors, needs, (grad,))
    parts = [
        gradients_by_vjp(formula, _take(tensors, split, part), needs, (grad[part],))
        for part in slices
    ]
    return tuple(
        None if gradients[0] is None else torch.cat(gradients) if is_split else _sum(gradients)
        for gradients, is_split in zip(zip(*parts, strict=True), split, strict=True)
    )


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum in float32 at least, in the order of the tensors."""
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor in tensors:
        total += tensor
    return total.to(tensors[0].dtype)


def _take(
    tensors: Sequence[Tensor | None], split: Sequence[bool], part: slice
) -> list[Tensor | None]:
    return [
        tensor[part] if tensor is not None and is_split else tensor
        for tensor, is_split in zip(tensors, split, strict=True)
    ]
