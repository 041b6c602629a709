"""Linear layers with weights in oneDNN's own layout, for inference on a CPU.

torch has public functions for that layout only as modules that copy their input; so this calls the operators that torch.compile
calls (`torch.ops.mkldnn`), if they are there.
"""

import copy
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Generic, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from refsam_kernels.core.transforms import is_transformed
from refsam_kernels.fingerprint import Fingerprint

Made = TypeVar("Made")


def can_prepack(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether this torch packs such weights, in their own dtype or in this one: float32 or bfloat16 on a CPU."""
    return (
        weight.device.type == "cpu"
        and (dtype or weight.dtype) in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself (AMX or AVX-512), as far as torch can say."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class PackedLinear:
    """A linear layer with weight (out, in) and bias (out,) or None in oneDNN's layout, optionally with an exact GELU;
    needs `can_prepack`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = bias
        self.activation = "gelu" if gelu else "none"

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), both in the weights' dtype."""
        return torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self.activation, [], "none"
        )

    def but(self, **changes: Any) -> "PackedLinear":
        """The same packed weight with another `bias` or `activation`."""
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed


def may_stand_in(module: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether a copy of its weights may stand for the module: a plain one, where no gradient, autocast or trace is wanted."""
    return (
        is_plain_linear(module)
        and not is_followed(x)
        and not _wants_gradient(module, x)
        and not torch.is_autocast_enabled("cpu")
        and x.dtype == module.weight.dtype
    )


def _wants_gradient(module: nn.Linear, x: Tensor) -> bool:
    """Whether somebody wants a gradient of the module's product with x."""
    return torch.is_grad_enabled() and (x.requires_grad or trains(module))


def dtype_of_call(x: Tensor) -> torch.dtype:
    """In which a linear layer on a CPU computes with x: its own, or autocast's."""
    is_cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if is_cast else x.dtype


def can_pack(module: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether the module is `weight x + bias`, of weights that torch packs in the dtype in which it computes with x, untraced."""
    return (
        not is_followed(x)
        and has_plain_weights(module)
        and x.device.type == "cpu"
        and x.numel() > 0
        and can_prepack(module.weight, dtype_of_call(x))
        and (torch.is_autocast_enabled("cpu") or x.dtype == module.weight.dtype)
    )


def trains(module: nn.Linear) -> bool:
    """Whether a gradient of the weight or the bias is wanted."""
    # Not `parameters()`: FSDP1 gives a module plain tensors in their place.
    return any(each is not None and each.requires_grad for each in (module.weight, module.bias))


def is_followed(x: Tensor) -> bool:
    """Whether operations on x are recorded or transformed, not only computed; or it is no plain tensor."""
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return is_traced or is_transformed() or type(x) is not Tensor


class LinearCopy(Generic[Made]):
    """Something made of a linear module's weights, at first use and again when `Fingerprint` sees a change."""

    def __init__(self, make: Callable[[Tensor, Tensor | None], Made]) -> None:
        self._make = make
        self._fingerprint = Fingerprint()
        self._made: tuple[Hashable, Made] | None = None

    def of(self, module: nn.Linear, dtype: torch.dtype | None = None) -> Made:
        """The copy of the module's present weights, in their own dtype or in this one."""
        # Not `parameters()`: FSDP1 gives a module plain tensors in their place.
        weight, bias = module.weight, module.bias
        key = dtype, self._fingerprint(each for each in (weight, bias) if each is not None)
        if self._made is None or self._made[0] != key:
            # Tensors made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                wanted = dtype or weight.dtype
                self._made = (
                    key,
                    self._make(weight.to(wanted), None if bias is None else bias.to(wanted)),
                )
        return self._made[1]

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles make their own: tensors in oneDNN's layout have no storage."""
        return {"_make": self._make, "_fingerprint": Fingerprint(), "_made": None}


class PackedCopy(LinearCopy[PackedLinear]):
    """A packed copy of a linear module's weights, in their dtype or in autocast's."""

    def __init__(self, *, gelu: bool = False) -> None:
        super().__init__(partial(PackedLinear, gelu=gelu))

    @staticmethod
    def is_supported(module: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
        """Whether it may compute for the module's `forward`: in inference, where torch packs such weights."""
        return can_pack(module, x) and not _wants_gradient(module, x)

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        """(..., in) to (..., out), with an exact GELU behind it if so made; `is_supported` must hold."""
        dtype = dtype_of_call(x)
        return self.of(module, dtype)(x.to(dtype))


def has_plain_weights(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is no sub-class of nn.Linear and has no quantised tensor."""
    return type(module) is nn.Linear and {type(module.weight), type(module.bias)} <= {
        nn.Parameter,
        Tensor,
        type(None),
    }


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is `weight x + bias` and no more: no sub-class, no hooks, no quantised tensor."""
    return has_plain_weights(module) and is_unhooked(module)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module does nothing but run its class's `forward`; hooks of all modules count."""
    own = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not (any(own) or "forward" in vars(module) or _has_any_global_hook())
