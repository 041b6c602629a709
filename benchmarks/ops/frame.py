"""A 720p frame on the host to masks of its size on the host: our sessions against one encoder pass per expression.

`benchmarks.end_to_end.per_expression` is the loop, segment-anything's modules in eager float32; it and every session have
the same random weights. Text is encoded once on both sides. Every call is a video's first frame: there is no track token yet.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end.expressions import EXPRESSIONS, SIZE, make_model
from benchmarks.end_to_end.per_expression import PerExpressionLoop
from benchmarks.ops.image_encoder import encoder_flops
from benchmarks.registry import DEVICES, Workload, register
from refsam import RefSAM, VideoSession
from refsam.runtime.device import choose_dtype, choose_encoder_dtype
from refsam.session import FrameGraphs
from tests.sam_modeling import randomise

OPERATOR, BASELINE = "frame", "per-expression loop"
# Relative to the largest logit; with automatic dtypes twice the change by bfloat16 in the loop's encoder.
TOLERANCE = 1e-4

Masks = tuple[Tensor, float]  # (P, H, W) bool, and how far off their logits may be


def workload(device: str, *, preset: str, image_size: int, expressions: int) -> Workload:
    """A model with the small text encoder and random weights."""
    model: Any = randomise(make_model(preset, image_size, None))
    return compare_frames(model.to(device), EXPRESSIONS[:expressions], SIZE)


@torch.no_grad()
def compare_frames(model: RefSAM, expressions: tuple[str, ...], size: tuple[int, int]) -> Workload:
    """The loop and sessions with float32 and automatic dtypes, on GPUs also by CUDA graphs."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator)
    prompts = [model.encode_text([text]) for text in expressions]
    exact, _ = PerExpressionLoop(model).step(frame, prompts)
    rounded, _ = PerExpressionLoop(model, torch.bfloat16).step(frame, prompts)
    limit = max(TOLERANCE, 2 * float((rounded - exact).abs().max() / exact.abs().max()))
    exactly, automatic = ours(model, expressions, "float32"), ours(model, expressions, "auto")
    calls: dict[str, Callable[[Tensor], Masks]] = {
        BASELINE: partial(loop_masks, PerExpressionLoop(model), prompts),
        "session, float32": lambda frame: (exactly(frame), TOLERANCE),
        "session, automatic dtypes": lambda frame: (automatic(frame), limit),
    }
    if model.device.type == "cuda":
        graphed = ours(model, expressions, "auto", graphs=True)
        calls["session, automatic dtypes, CUDA graphs"] = lambda frame: (graphed(frame), limit)
    products = choose_dtype("auto", model.device)
    if products == torch.float32:
        products = copy.deepcopy(model).optimize().image_encoder.product_dtype
    weights = sum(parameter.numel() for parameter in model.image_encoder.parameters())
    return Workload(
        providers={name: partial(call, frame) for name, call in calls.items()},
        wrong=partial(wrong_masks, exact=exact.cpu()),
        moved_bytes=weights * products.itemsize,
        flops=encoder_flops(model.config),
        shapes={
            "frame": list(frame.shape),
            "expressions": len(expressions),
            "limit": limit,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        },
        dtype=products,
    )


def loop_masks(loop: PerExpressionLoop, prompts: list[Any], frame: Tensor) -> Masks:
    """The loop's masks of a first frame."""
    loop.tracks.clear()
    return loop.step(frame.to(loop.model.device), prompts)[1].cpu(), TOLERANCE


def ours(
    model: RefSAM, expressions: tuple[str, ...], dtype: str, *, graphs: bool = False
) -> Callable[[Tensor], Tensor]:
    """A session's masks of a first frame, in the dtypes that `refsam segment --dtype` would choose."""
    model = copy.deepcopy(model).optimize(choose_encoder_dtype(dtype))
    session = VideoSession(model, expressions, graphs=FrameGraphs(model) if graphs else None)
    precision = choose_dtype(dtype, model.device)

    def masks(frame: Tensor) -> Tensor:
        session.reset()
        lowered = precision != torch.float32
        with torch.autocast(model.device.type, precision) if lowered else nullcontext():
            return session.step(frame).masks.cpu()

    return masks


def wrong_masks(found: Masks, *, exact: Tensor) -> str | None:
    """Masks may differ where a logit (P, H, W) is at the threshold, nowhere else."""
    masks, limit = found
    decided = exact.abs() > limit * exact.abs().max()
    different = int(((masks != (exact > 0)) & decided).sum())
    return f"{different} decided pixels differ, none may" if different else None


for name, preset, image_size, expressions, devices in (
    ("ViT-B", "vit_b", 512, 4, DEVICES),
    ("ViT-B", "vit_b", 1024, 1, ("cuda",)),
    ("ViT-B", "vit_b", 1024, 8, ("cuda",)),
    ("ViT-L", "vit_l", 1024, 1, ("cuda",)),
    ("ViT-H", "vit_h", 1024, 1, ("cuda",)),
):
    case = partial(workload, preset=preset, image_size=image_size, expressions=expressions)
    label = f"{name}, {image_size} pixels, {expressions} expression{'s' * (expressions > 1)}"
    register(OPERATOR, label, baseline=BASELINE, devices=devices)(case)
