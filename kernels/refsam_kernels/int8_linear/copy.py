"""Quantised copies of linear modules' weights, for modules that stay as they are."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from refsam_kernels.fingerprint import Fingerprint
from refsam_kernels.int8_linear.op import DTYPES, int8_linear
from refsam_kernels.int8_linear.weights import Int8Weights, quantise_weights
from refsam_kernels.packed_linear import is_plain_linear


class Int8Copy:
    """A quantised copy of a linear module's weights, made at first use and again when `Fingerprint` sees a change."""

    def __init__(self) -> None:
        self._fingerprint = Fingerprint()
        self._made: tuple[Hashable, Int8Weights] | None = None

    @staticmethod
    def is_supported(module: nn.Module, x: Tensor) -> bool:
        """Whether it may stand for the module: a plain one on a CPU, without autograd, autocast or tracing."""
        return (
            is_plain_linear(module)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and type(x) is Tensor
            and x.device.type == module.weight.device.type == "cpu"
            and x.dtype == module.weight.dtype
            and x.dtype in DTYPES
        )

    def weights(self, module: nn.Linear) -> Int8Weights:
        """The module's weights as they are now, quantised."""
        tensors = (module.weight, module.bias)
        key = self._fingerprint(tensor for tensor in tensors if tensor is not None)
        if self._made is None or self._made[0] != key:
            # Tensors made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                self._made = key, quantise_weights(module.weight, module.bias)
        return self._made[1]

    def __call__(self, module: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., in) to (..., out) of this dtype; `is_supported` must hold."""
        return int8_linear(x, self.weights(module), dtype=dtype)

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles make their own."""
        return {"_fingerprint": Fingerprint(), "_made": None}
