"""The positions' share of a projection, for all expressions at once, and remembered while nothing that it is made of changes."""

import weakref
from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from refsam_kernels.core.streams import is_capturing, settle
from refsam_kernels.fingerprint import Fingerprint


class _Remembered(NamedTuple):
    product: Tensor
    made_of: tuple[weakref.ref[Tensor], ...]
    fingerprint: Fingerprint
    key: Hashable


# By positions, then by the identity of the weight: an entry goes when the positions do.
_memory: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def project_positions(
    positions: Tensor, weight: Tensor, bias: Tensor | None, remember: bool
) -> Tensor:
    """weight @ positions^T (+ bias), channels first: (1, T, C) -> (1, I, T) in the dtype of the weight.

    With `remember` it is computed once for the same tensors with the same `Fingerprint`. Within a CUDA graph it is always
    computed: a replay must follow the weights.
    """
    tensors = [t for t in (positions, weight, bias) if t is not None]
    if not remember or any(t.is_inference() for t in tensors) or is_capturing(positions):
        return _project(positions, weight, bias)
    of_weights = _memory.setdefault(positions, {})
    found = of_weights.get(id(weight))
    is_same = found is not None and _same(found.made_of, tensors)
    fingerprint = found.fingerprint if found is not None and is_same else Fingerprint()
    key = fingerprint(tensors)
    if found is None or not is_same or found.key != key:
        product = _project(positions, weight, bias)
        settle([product])
        made_of = tuple(weakref.ref(t) for t in tensors)
        found = _Remembered(product, made_of, fingerprint, key)
        of_weights[id(weight)] = found
    return found.product


def _project(positions: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = weight @ positions.to(weight.dtype).mT
    return product if bias is None else product.add_(bias.unsqueeze(-1))


def _same(references: tuple[weakref.ref[Tensor], ...], tensors: list[Tensor]) -> bool:
    return len(references) == len(tensors) and all(
        reference() is tensor for reference, tensor in zip(references, tensors, strict=True)
    )
