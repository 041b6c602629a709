"""Caches on a GPU: one stream fills them, others read them, and no CUDA graph may own them."""

from collections.abc import Iterable

import torch
from torch import Tensor


def settle(tensors: Iterable[Tensor]) -> None:
    """Waits, once for each GPU, until the current stream has written these tensors, so that any stream may read them.

    Call it before tensors go into a cache, never during the capture of a CUDA graph.
    """
    for device in {tensor.device for tensor in tensors if is_on_gpu(tensor)}:
        torch.cuda.current_stream(device).synchronize()


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the tensor's GPU; new tensors then live in the graph's own memory."""
    return is_on_gpu(tensor) and torch.cuda.is_current_stream_capturing()


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether the tensor is computed by streams."""
    return tensor.is_cuda
