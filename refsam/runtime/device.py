"""Resolves names such as ``auto`` to a device and a precision."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from refsam.errors import UserError
from refsam.runtime.shard import local_rank
from refsam.runtime.threads import wait_passively

if TYPE_CHECKING:
    import torch

_DTYPES = ("auto", "float32", "bfloat16", "int8")


def check_names(device: str, dtype: str) -> None:
    """Refuse misspelt names before anything is loaded. Raises UserError: a name that is not offered."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: want auto, cpu, cuda or cuda:N")
    check_dtype(dtype, _DTYPES)


def check_dtype(name: str, offered: Sequence[str]) -> None:
    """Refuse a dtype that is not offered, with a UserError."""
    if name not in offered:
        raise UserError(f"--dtype {name}: want {', '.join(offered[:-1])} or {offered[-1]}")


def choose_device(name: str) -> "torch.device":
    """The device of that name; ``auto`` is the GPU that torchrun assigns to this process, else the first GPU, else the CPU.

    Raises UserError: the machine has no such GPU.
    """
    wait_passively()
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", local_rank() % count) if count else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: {gpus_here()}; use --device cpu")
    return device


def gpus_here() -> str:
    """How many GPUs torch sees, in words."""
    import torch

    count = torch.cuda.device_count()
    found = f"{count} GPU{'s' if count != 1 else ''}" if count else "no CUDA GPU"
    return f"torch {torch.__version__} sees {found} here"


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """Autocast dtype; ``auto`` is bfloat16 on GPUs that compute in it (Ampere and later), else float32.

    CPUs stay at float32: small products lose more to conversion than bfloat16 gains. The image encoder, whose products
    are large, has a dtype of its own: see `choose_encoder_dtype`.

    Raises:
        UserError: bfloat16 on a GPU that lacks it, int8 on any GPU.
    """
    import torch

    if name == "int8":
        if device.type != "cpu":
            raise UserError(f"--dtype int8: got device {device}; want --device cpu")
        return torch.float32  # for everything but the image encoder

    has_bfloat16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bfloat16" and not has_bfloat16:
        raise UserError(
            f"--dtype bfloat16: {torch.cuda.get_device_name(device)} lacks it; use --dtype float32"
        )
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16 else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def choose_encoder_dtype(name: str) -> "torch.dtype | None":
    """The argument for `RefSAM.optimize`: None, its own choice, for ``auto``."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def precision_facts(precision: "torch.dtype", product_dtype: "torch.dtype") -> dict[str, str]:
    """Names of autocast's dtype and of that of the image encoder's products, which is `product_dtype` without autocast."""
    import torch

    encoder = precision if precision != torch.float32 else product_dtype
    names = {"dtype": precision, "encoder_dtype": encoder}
    return {key: str(dtype).removeprefix("torch.") for key, dtype in names.items()}


def autocast(device: "torch.device", dtype: "torch.dtype") -> "torch.autocast":
    """Autocast to `dtype` on a device; off for float32."""
    import torch

    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
