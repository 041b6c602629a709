"""The frozen benchmark of generated clips, on which the bundled model is measured.

Version 1 has 240 clips of 24 frames, each with an expression about an object that is there and one about an object that is
not. Training never uses its pairs of colour and shape, expression templates and background photographs. The benchmark is drawn
from its seeds each time; `generated_v1.json` has every expression and the area of every mask, so that a generator that would
draw anything else is refused.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from refsam.data.generated import GeneratedClip, generate_clip
from refsam.data.generated.grammar import KINDS
from refsam.errors import UserError
from refsam.metrics import contour_accuracy, region_similarity
from refsam.model import PromptedSAM
from refsam.session import VideoSession

CLIPS = 240
FRAMES = 24
_SEED = 7_000_000
_SIZES = ((180, 320), (180, 320), (240, 320), (256, 256), (320, 180), (216, 384))
_AREA_TOLERANCE = 0.01
_MANIFEST = "generated_v1.json"


@dataclass(frozen=True)
class ExpressionScore:
    """Scores of one expression of the benchmark.

    `region` and `contour` are J and F averaged over the frames that show the object (None where none does), `false_area` the
    share of the frame marked, averaged over the frames that do not (None where all do).
    """

    clip: int
    kind: str
    text: str
    region: float | None
    contour: float | None
    false_area: float | None


def benchmark_clip(index: int) -> GeneratedClip:
    """Clip `index` of the benchmark, its expression about a present object first, the one about an absent object second."""
    return generate_clip(**benchmark_arguments(index), with_photographs=True)


def benchmark_arguments(index: int) -> dict[str, Any]:
    """The arguments that draw clip `index`: seed, frames, size, kinds of expression, held out from training."""
    return {
        "seed": _SEED + index,
        "frames": FRAMES,
        "size": _SIZES[index % len(_SIZES)],
        "kinds": (KINDS[index % (len(KINDS) - 1)], "absent"),
        "held_out": True,
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table: a row per kind of expression, then the area that is marked where nothing should be."""
    lines = ["| expressions that name | number | J | F | J&F |", "|---|--:|--:|--:|--:|"]
    for name, row in summary["accuracy"].items():
        if row["sentences"]:
            scores = " | ".join(f"{row[key]:.3f}" for key in ("J", "F", "J&F"))
            lines.append(f"| {name} | {row['sentences']} | {scores} |")
    if summary["false_area"] is not None:
        lines.append("")
        lines.append(
            f"Falsely marked area where the object is absent: {100 * summary['false_area']:.3f} % of the frame "
            f"({summary['sentences_with_absent_frames']} expressions)."
        )
    return "\n".join(lines)


def evaluate_generated(
    model: PromptedSAM, clips: int = CLIPS, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Score the model on the first `clips` clips: a summary by kind of expression, and every expression's score.

    Raises UserError where the generator does not draw the benchmark as it was frozen.
    """
    frozen = json.loads(
        files("refsam.evaluation.runners").joinpath(_MANIFEST).read_text(encoding="utf-8")
    )
    scores: list[ExpressionScore] = []
    for index in range(clips):
        clip = benchmark_clip(index)
        _check_frozen(index, _describe(clip), frozen["clips"][index])
        scores += _score_clip(index, clip, model)
        advance()
    return {"version": 1, "summary": summarise(scores), "sentences": [asdict(s) for s in scores]}


def summarise(scores: list[ExpressionScore]) -> dict[str, Any]:
    """J, F, J&F per kind, over the kinds that name colour or shape, and over everything; the mean false area."""
    named = [s for s in scores if s.kind in ("colour", "shape", "colour and shape")]
    groups = {kind: [s for s in scores if s.kind == kind] for kind in KINDS if kind != "absent"}
    groups |= {"colour or shape": named, "everything": scores}
    false_areas = [s.false_area for s in scores if s.false_area is not None]
    return {
        "accuracy": {name: _mean(group) for name, group in groups.items()},
        "false_area": float(np.mean(false_areas)) if false_areas else None,
        "sentences_with_absent_frames": len(false_areas),
    }


def _mean(scores: list[ExpressionScore]) -> dict[str, float | int]:
    shown = [s for s in scores if s.region is not None and s.contour is not None]
    if not shown:
        return {"sentences": 0}
    region = float(np.mean([s.region for s in shown]))
    contour = float(np.mean([s.contour for s in shown]))
    return {"sentences": len(shown), "J": region, "F": contour, "J&F": (region + contour) / 2}


def _score_clip(index: int, clip: GeneratedClip, model: PromptedSAM) -> Iterator[ExpressionScore]:
    session = VideoSession(model, clip.expressions)
    predicted = np.stack([np.asarray(session.step(frame).masks) for frame in clip.frames], axis=1)
    for e, (text, kind) in enumerate(zip(clip.expressions, clip.kinds, strict=True)):
        truth = clip.masks[e].numpy()
        shown = truth.any(axis=(1, 2))
        marked = predicted[e][~shown]
        region, contour = (
            float(measure(predicted[e][shown], truth[shown]).mean()) if shown.any() else None
            for measure in (region_similarity, contour_accuracy)
        )
        false_area = float(marked.mean()) if len(marked) else None
        yield ExpressionScore(index, kind, text, region, contour, false_area)


def _describe(clip: GeneratedClip) -> dict[str, Any]:
    areas = clip.masks.sum(dim=(2, 3), dtype=torch.int64)
    return {
        "size": list(clip.frames.shape[1:3]),
        "sentences": [list(pair) for pair in zip(clip.kinds, clip.expressions, strict=True)],
        "area": areas.sum(dim=1).tolist(),
        "shown": (areas > 0).sum(dim=1).tolist(),
    }


def _check_frozen(index: int, drawn: dict[str, Any], frozen: dict[str, Any]) -> None:
    """Raise UserError for another benchmark; rounding may make areas differ by single pixels between processors."""
    same = all(drawn[key] == frozen[key] for key in ("size", "sentences"))
    allowed = [_AREA_TOLERANCE * area + FRAMES for area in frozen["area"]]
    gaps = [abs(a - b) for a, b in zip(drawn["area"], frozen["area"], strict=True)]
    if not same or any(gap > limit for gap, limit in zip(gaps, allowed, strict=True)):
        raise UserError(
            f"clip {index} of the generated benchmark is not the one that was frozen as version 1: drawn {drawn}, wanted "
            f"{frozen}. Restore refsam.data.generated, or freeze a new version under a new name"
        )
