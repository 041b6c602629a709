"""Curves of J and F over time, one picture per video."""

import io
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from refsam.errors import UserError
from refsam.evaluation.scoring.results import ObjectScores, write_whole

_LEGEND_ENTRIES = 12


def check_plots() -> None:
    """Raise UserError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'refsam[eval]'") from error


def write_plots(scores: Iterable[ObjectScores], folder: Path) -> list[Path]:
    """Write `<folder>/<video>.png` for every video: J (solid) and F (dashed) of each object; return the files.

    Raises UserError without matplotlib.
    """
    check_plots()
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(scores, key=lambda score: score.video)
    paths = []
    for video, objects in groupby(ordered, key=lambda score: score.video):
        paths.append(folder / f"{video}.png")
        write_whole(paths[-1], _plot(video, list(objects)))
    return paths


def _plot(video: str, objects: list[ObjectScores]) -> bytes:
    # Figure without pyplot: no global state, no window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, score in enumerate(objects):
        colour, measures = f"C{index % 10}", score.measures
        label = f"{score.name}: J {measures['J-Mean']:.3f}, F {measures['F-Mean']:.3f}"
        axes.plot(
            score.region, color=colour, label=label, marker="." if len(score.frames) == 1 else ""
        )
        axes.plot(score.contour, color=colour, linestyle="--")
    axes.set(title=video, xlabel="frame scored", ylabel="J (solid), F (dashed)", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    if len(objects) <= _LEGEND_ENTRIES:
        axes.legend(loc="lower left", fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()
