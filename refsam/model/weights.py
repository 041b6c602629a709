"""When weights have changed: what caches that depend on them compare."""

from collections.abc import Hashable, Iterable

from torch import Tensor


def weights_key(tensors: Iterable[Tensor]) -> Hashable:
    """Something that changes whenever one of the tensors does: in place, by another one, by its dtype or device."""
    return tuple(
        # Inference tensors count no versions.
        (
            tensor.data_ptr(),
            0 if tensor.is_inference() else tensor._version,
            tensor.dtype,
            tensor.device,
        )
        for tensor in tensors
    )
