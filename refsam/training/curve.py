"""A run's learning curve as a picture: the loss of training, and the score of validation where there is one."""

import json
from pathlib import Path

_CURVES = {"total": ("loss (training)", "C0"), "J&F": ("J&F (validation)", "C3")}


def draw_curve(log: Path, path: Path) -> list[str]:
    """Draw `log.jsonl` into a PNG, each curve on an axis of its own; returns a note where matplotlib is missing."""
    try:
        # Figure without pyplot: no global state, no window system.
        from matplotlib.figure import Figure
    except ImportError:
        return ["not drawn: pip install 'refsam[train]'"]
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="step")
    for key, (label, colour) in _CURVES.items():
        points = [(record["step"], record[key]) for record in records if key in record]
        if not points:
            continue
        own = axes if key == "total" else axes.twinx()
        own.plot(*zip(*points, strict=True), color=colour, marker="." if len(points) < 40 else "")
        own.set_ylabel(f"{label}: from {points[0][1]:.3g} to {points[-1][1]:.3g}", color=colour)
    figure.savefig(path)
    return []
