"""Curves of scores over frames: as SVG in reports, and one PNG per video."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refsam.errors import UserError
from refsam.evaluation.reports.pictures import COLOURS
from refsam.evaluation.reports.report import Picture, Text
from refsam.evaluation.scoring.results import ObjectScores, by_video
from refsam.runtime.files import replace_file

_MISSING = "plots need matplotlib: pip install 'refsam[eval]'"
_MOST_LABELS = 12


@dataclass(frozen=True)
class Curve:
    """One line of a chart: `values` `(T,)` in 0..1."""

    label: str
    values: NDArray[np.float64]
    colour: str
    dashed: bool = False


def check_plots() -> None:
    """Raise UserError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(_MISSING) from error


def write_plots(scores: Iterable[ObjectScores], folder: Path) -> list[Path]:
    """Write `<folder>/<video>.png` for every video: J (solid) and F (dashed) of each object; return the files.

    Raises UserError without matplotlib.
    """
    check_plots()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for video, objects in sorted(by_video(scores).items()):
        curves = [c for index, score in enumerate(objects) for c in both_curves(index, score)]
        paths.append(folder / f"{video}.png")
        replace_file(paths[-1], chart(curves, objects[0].frames, "png", video))
    return paths


def both_curves(index: int, score: ObjectScores) -> list[Curve]:
    """J and F of an object over the frames, in the colour of that number."""
    colour, measures = COLOURS[index % len(COLOURS)], score.measures
    return [
        Curve(f"{score.name}: J {measures['J-Mean']:.3f}", score.region, colour),
        Curve(f"{score.name}: F {measures['F-Mean']:.3f}", score.contour, colour, dashed=True),
    ]


def picture(
    name: str, curves: Sequence[Curve], frames: Sequence[str], caption: str
) -> Picture | Text:
    """The chart as part of a report; without matplotlib, a text that says so."""
    try:
        return Picture(name, "image/svg+xml", chart(curves, frames), caption)
    except ImportError:
        return Text((f"{caption}: {_MISSING}",))


def chart(
    curves: Sequence[Curve], frames: Sequence[str], kind: str = "svg", title: str = ""
) -> bytes:
    """A picture of curves in 0..1 over the frames, with a legend where there are few of them."""
    # Figure without pyplot: no global state, no window system.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        style, marker = "--" if curve.dashed else "-", "." if len(curve.values) == 1 else ""
        axes.plot(curve.values, style, color=curve.colour, marker=marker, label=curve.label[:44])
    axes.set(ylim=(-0.02, 1.02), title=title)
    ends = sorted({0, len(frames) - 1})
    axes.set_xticks(ends, [frames[end] for end in ends])
    axes.grid(alpha=0.3)
    if len(curves) <= _MOST_LABELS:
        axes.legend(loc="lower left", fontsize="small", ncols=2)
    content = io.BytesIO()
    # Without a date and with a fixed salt the same input gives the same file.
    with rc_context({"svg.hashsalt": "refsam", "svg.fonttype": "none"}):
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
