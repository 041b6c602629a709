"""Detects changes of tensors, also those that torch's version counter misses.

`p.data.mul_()`, `torch._foreach_*` on `.data`, loops over `state_dict()` and FSDP1's flat parameters write values
without a new version. So on a CPU the values are sampled, too: some in every row and every column of a matrix.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Integers of a value's size: bits are compared, so that NaN equals itself and no rounding hides a change.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Approximate number of values sampled from a vector.
SAMPLES = 4096


class Fingerprint:
    """Gives a key of tensors that changes when they are replaced or written to.

    It keeps views of the last call's tensors, which therefore live until the next call; copies and pickles start
    empty.
    """

    def __init__(self) -> None:
        self._seen: _Samples | None = None

    def __call__(self, tensors: Iterable[Tensor]) -> Hashable:
        """A key that changes with any of the tensors: their memory, layout, dtype, device or, after writes in place,
        their values.

        Writes are detected by torch's version counter and, on a CPU, by the values, if a whole row or column of a
        matrix changes. On other devices, where reading values would stop the stream, only the counter is used.
        """
        tensors = list(tensors)
        places = tuple([(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors])
        seen = self._seen
        if seen is None or seen.places != places or not seen.are_there():
            self._seen = seen = _Samples(tensors, places)
        # Inference tensors count no versions.
        versions = tuple([0 if t.is_inference() else t._version for t in tensors])
        return places, versions, seen.digest()

    def __reduce__(self) -> Any:
        return Fingerprint, ()


class _Samples:
    """Views of sampled values of tensors at these addresses, and a buffer for their copies."""

    def __init__(self, tensors: list[Tensor], places: tuple[Any, ...]) -> None:
        self.places = places
        # Copied, not shared with numpy: that would forbid FSDP to free a storage.
        with torch.inference_mode(False), torch.no_grad():
            self._views = [view for tensor in tensors for view in sampled(tensor)]
            sizes = [-(-view.numel() * view.element_size() // 8) * 8 for view in self._views]
            self._bytes = torch.zeros(sum(sizes), dtype=torch.uint8)
            parts = zip(self._bytes.split(sizes), self._views, strict=True)
            self._copies = [
                part.view(view.dtype)[: view.numel()].view(view.shape) for part, view in parts
            ]
        self._starts = [view.data_ptr() for view in self._views]

    def are_there(self) -> bool:
        """Whether no storage was freed since."""
        return self._starts == [view.data_ptr() for view in self._views]

    def digest(self) -> int:
        """A hash of the values as they are now."""
        with torch.no_grad():
            if self._copies:
                torch._foreach_copy_(self._copies, self._views)
        return hash(self._bytes.numpy().tobytes())


def sampled(tensor: Tensor) -> list[Tensor]:
    """Views of the bits of values in every row and every column; none where they cannot be looked at.

    Most of the time goes into fetching memory, page by page. So rows are looked at where two of them meet, and columns
    in the last row.
    """
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    bits = BITS.get(tensor.element_size())
    if not is_plain or tensor.device.type != "cpu" or bits is None or tensor.data_ptr() == 0:
        return []  # FSDP has parameters without memory
    values = tensor.detach().view(bits)
    values = values.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if not values.is_contiguous():
        return [values]  # all of them: between a slice's rows there is no one step
    if values.dim() < 2:
        return [values.view(-1)[:: max(1, values.numel() // SAMPLES)]]
    rows, columns = values.flatten(1).shape
    # The last value of a row and the first one of the next, of rows 0 and 1, 2 and 3, ...
    borders = values.view(-1)[columns - 1 :].as_strided((rows // 2, 2), (2 * columns, 1))
    return [borders, values[-1].flatten()]
