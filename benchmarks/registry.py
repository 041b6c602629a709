"""Benchmark cases: each makes its inputs and names the ways to compute its result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from refsam_kernels.core.dispatch import BACKENDS, Dispatcher

Provider = Callable[[], Any]  # one tensor, or several
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Workload:
    """A case on one device, its inputs already there: providers take no arguments, so that only the operator is timed.

    `wrong` says in words what is wrong with a result, or None. `moved_bytes` and `flops` are what any implementation
    must read and write, and compute in products of `dtype`: they give the time that no implementation can beat. `ceilings` do
    less work than the case asks for: they are timed, not checked. `skipped` has the reason of each provider that cannot run here.
    """

    providers: dict[str, Provider]
    wrong: Callable[[Any], str | None]
    moved_bytes: int
    flops: int
    shapes: dict[str, Any]
    ceilings: dict[str, Provider] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One input of one operator; `baseline` is the provider that speed-ups refer to, `devices` where it takes no hours."""

    operator: str
    name: str
    baseline: str
    make: Callable[[str], Workload]
    devices: tuple[str, ...] = DEVICES


CASES: dict[str, Case] = {}
# The set for a few minutes: one inference of each operator, as a frame of ViT-B needs it, and smaller whole encoders and frames.
SHORT = frozenset(
    {
        "rel_pos_attention/ViT-B global",
        "rel_pos_attention/ViT-B windows",
        "adapter_projection/ViT-B, 1 image, float32",
        "adapter_mlp/ViT-B, 1 image, float32",
        "dense_attention/ViT-B, 8 expressions, float32",
        "token_image_attention/tokens to image, ViT-B, 8 expressions, float32",
        "token_image_attention/image to tokens, ViT-B, 8 expressions, float32",
        "mask_upscale/8 expressions, float32",
        "mask_postprocess/8 masks to 1080p",
        "mask_loss/4 masks at 480p, forward and backward",
        "image_encoder/ViT-B, 512 pixels, float32",
        "image_encoder/ViT-B, 512 pixels, bfloat16",
        "image_encoder/ViT-B, 512 pixels, int8",
        "frame/ViT-B, 512 pixels, 4 expressions",
    }
)


def register(
    operator: str, name: str, baseline: str, devices: tuple[str, ...] = DEVICES
) -> Callable[[Callable[[str], Workload]], Callable[[str], Workload]]:
    """Registers a function from a device ("cpu", "cuda") to a workload as a case."""

    def add(make: Callable[[str], Workload]) -> Callable[[str], Workload]:
        CASES[f"{operator}/{name}"] = Case(operator, name, baseline, make, devices)
        return make

    return add


def load_cases(wanted: list[str], device: str, *, short: bool = False) -> list[Case]:
    """The cases of the wanted operators on a device, of all operators if none is named; with `short` only those of `SHORT`.

    Raises `ValueError` for an unknown name.
    """
    known = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[!_]*.py"))
    for name in wanted or known:
        if name not in known:
            raise ValueError(f"operator: got {name!r}, wanted one of {', '.join(known)}")
        import_module(f"benchmarks.ops.{name}")
    return [
        case
        for key, case in CASES.items()
        if device in case.devices
        and (not wanted or case.operator in wanted)
        and (not short or key in SHORT)
    ]


def unusable(provider: Provider) -> str | None:
    """Try another library's provider once: the error that it raises here, or None."""
    try:
        provider()
    except Exception as error:  # a library that does not fit this machine can raise any error
        return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:200]
    return None


def backends_of(operator: str, device: str, *, with_reference: bool = False) -> Iterator[str]:
    """The backends of an operator that can run on a device here; the slow reference only if it is wanted."""
    dispatcher = Dispatcher.known[operator]
    named = (name for name in BACKENDS if with_reference or name != "reference")
    return (name for name in named if not dispatcher.environment_reasons(name, device))
