"""The positions' share of a projection, for all expressions at once, and remembered while nothing that it is made of changes."""

import weakref
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from refsam_kernels.core.streams import is_capturing, settle


class _Remembered(NamedTuple):
    product: Tensor
    made_of: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]


# By positions, then by the identity of the weight: an entry goes when the positions do.
_memory: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def project_positions(
    positions: Tensor, weight: Tensor, bias: Tensor | None, remember: bool
) -> Tensor:
    """weight @ positions^T (+ bias), channels first: (1, T, C) -> (1, I, T) in the dtype of the weight.

    With `remember` it is computed once for the same tensors with the same versions (torch counts every change in place but
    those through `.data`). Within a CUDA graph it is always computed: a replay must follow the weights.
    """
    tensors = [t for t in (positions, weight, bias) if t is not None]
    if not remember or any(t.is_inference() for t in tensors) or is_capturing(positions):
        return _project(positions, weight, bias)
    versions = tuple(t._version for t in tensors)
    of_weights = _memory.setdefault(positions, {})
    found = of_weights.get(id(weight))
    if found is None or found.versions != versions or not _same(found.made_of, tensors):
        product = _project(positions, weight, bias)
        settle([product])
        found = _Remembered(product, tuple(weakref.ref(t) for t in tensors), versions)
        of_weights[id(weight)] = found
    return found.product


def _project(positions: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = weight @ positions.to(weight.dtype).mT
    return product if bias is None else product.add_(bias.unsqueeze(-1))


def _same(references: tuple[weakref.ref[Tensor], ...], tensors: list[Tensor]) -> bool:
    return len(references) == len(tensors) and all(
        reference() is tensor for reference, tensor in zip(references, tensors, strict=True)
    )
