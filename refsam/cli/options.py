"""Options that several sub-commands share, and what ``--device`` and ``--dtype`` mean."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refsam.cores import available_cores
from refsam.errors import UserError

if TYPE_CHECKING:
    import torch

    from refsam.model import RefSAM

OutOption = Annotated[Path, typer.Option(help="Folder for the results; it must not exist yet.")]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the results of an earlier run in the folder."),
]
CheckpointOption = Annotated[
    str,
    typer.Option(help="Bundled name (nano), folder of a checkpoint, or Hugging Face Hub id."),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.", metavar="NAME")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Precision of matrix products: float32, bfloat16 or auto (bfloat16 where the GPU has it; on a CPU that has it, "
        "in the image encoder).",
        metavar="NAME",
    ),
]
GraphsOption = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs", help="Record a frame's work on the GPU once and replay it (experimental)."
    ),
]
# Multiplications with the image encoder's weights for one frame: nano has 0.7e9, ViT-B 350e9.
_SMALL_MODEL = 4e9
_MOST_THREADS_OF_SMALL = 4
_DTYPES = ("auto", "float32", "bfloat16")


def check_names(device: str, dtype: str) -> None:
    """Refuse misspelt names before anything is loaded.

    Raises:
        UserError: a name that is not offered.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: want auto, cpu, cuda or cuda:N")
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: want {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")


def choose_device(name: str) -> "torch.device":
    """The device of that name; ``auto`` is the GPU that torchrun means for this process, the first without it, else the CPU.

    Raises:
        UserError: the machine has no such GPU.
    """
    # Decoder, encoder and torch share the cores. OpenMP's threads would wait for each other by spinning and so keep
    # the others off them: on two busy cores a frame then took 300 times as long. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        rank = os.environ.get("LOCAL_RANK", "")
        number = int(rank) if rank.isdigit() else 0
        return torch.device("cuda", number % count) if count else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} GPU{'s' if count != 1 else ''}" if count else "no CUDA GPU"
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees {found} here; use --device cpu"
        )
    return device


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """Autocast dtype; ``auto`` is bfloat16 on GPUs that compute in it (Ampere and later), else float32.

    CPUs stay at float32: small products there lose more to conversion than bfloat16 gains. The image encoder, which
    has large ones, is told apart: see `choose_encoder_dtype`.

    Raises:
        UserError: bfloat16 on a GPU that lacks it.
    """
    import torch

    has_bfloat16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bfloat16" and not has_bfloat16:
        raise UserError(
            f"--dtype bfloat16: {torch.cuda.get_device_name(device)} lacks it; use --dtype float32"
        )
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16 else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def choose_encoder_dtype(name: str) -> "torch.dtype | None":
    """What `RefSAM.optimize` is to be told: None, its own choice, for ``auto``."""
    import torch

    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_threads(model: "RefSAM") -> None:
    """Let torch compute with few threads for a small model on the CPU, unless OMP_NUM_THREADS says how many.

    Threads that share small products wait for each other at each of them, and whatever reads and writes the
    frames meanwhile needs a core too. A large model keeps all cores.
    """
    import torch

    if model.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    encoder = model.config.image_encoder
    tokens = (encoder.image_size // encoder.patch_size) ** 2
    products = 12 * tokens * encoder.depth * encoder.embed_dim**2
    if products < _SMALL_MODEL:
        torch.set_num_threads(max(1, min(available_cores() - 1, _MOST_THREADS_OF_SMALL)))
