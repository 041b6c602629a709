"""The result of a layer norm, computed again for the backward pass instead of kept: adapters keep what they are given."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from refsam_kernels.packed_linear import is_followed

# Private, as there is no other way to ask whether somebody (a checkpoint, an offload to another device) keeps tensors otherwise.
_others_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


@dataclass(frozen=True)
class _Again:
    """How to make a layer norm's result of what the norm itself keeps."""

    norm: Any  # its node in the graph
    shape: torch.Size

    def __call__(self) -> Tensor:
        result = (self.norm._saved_input - self.norm._saved_result1).mul_(self.norm._saved_result2)
        if self.norm._saved_weight is not None:
            result.mul_(self.norm._saved_weight)
        if self.norm._saved_bias is not None:
            result.add_(self.norm._saved_bias)
        return result.reshape(self.shape)


def normed_again(tokens: Tensor) -> AbstractContextManager[Any]:
    """While it is entered, what is computed of a layer norm's result (..., D) does not keep it.

    On a CPU in float32; elsewhere it is kept, as under autocast, which keeps its lower copy.
    """
    node = None if is_followed(tokens) or not torch.is_grad_enabled() else tokens.grad_fn
    if (
        type(node).__name__ != "NativeLayerNormBackward0"
        or tokens.device.type != "cpu"
        or tokens.dtype != torch.float32
        or not tokens.is_contiguous()
        or _others_hooks is None
        or _others_hooks(False) is not None
    ):
        return nullcontext()
    place, size = tokens.data_ptr(), tokens.numel()

    def pack(kept: Tensor) -> Tensor | _Again:
        is_result = kept.layout == torch.strided and kept.data_ptr() == place
        is_whole = is_result and kept.numel() == size and kept.dtype == torch.float32
        return _Again(node, kept.shape) if is_whole and kept.is_contiguous() else kept

    return saved_tensors_hooks(pack, lambda kept: kept() if isinstance(kept, _Again) else kept)
