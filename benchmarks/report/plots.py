"""A picture of each operator's rows: a bar for every provider of every case."""

from itertools import groupby
from pathlib import Path
from typing import Any


def write_plots(rows: list[dict[str, Any]], folder: Path) -> str:
    """Writes `<folder>/<operator>.svg` of the rows that have times; says in words what was drawn, or why nothing was."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no plots: matplotlib is not installed (pip install 'refsam[bench]')"
    timed = sorted((row for row in rows if "median_ms" in row), key=lambda row: row["operator"])
    names = []
    for operator, of_operator in groupby(timed, key=lambda row: row["operator"]):
        names.append(f"{operator}.svg")
        draw(operator, list(of_operator), folder / names[-1])
    return f"plots: {', '.join(names)}"


def draw(operator: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Medians with their 20th and 80th percentiles, case below case, and the limit of each case as a mark."""
    # Figure without pyplot: no global state, no window system.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.28 * (len(rows) + len(cases))), layout="constrained")
    axes = figure.add_subplot()
    labels, place = [], 0
    for case in cases:
        for row in (row for row in rows if row["case"] == case):
            low, high = row["median_ms"] - row["p20_ms"], row["p80_ms"] - row["median_ms"]
            colour = f"C{providers.index(row['provider']) % 10}"
            axes.barh(place, row["median_ms"], xerr=[[max(low, 0)], [max(high, 0)]], color=colour)
            axes.plot(row["ceiling_ms"], place, marker="|", color="black", markersize=12)
            labels.append((place, f"{case}: {row['provider']}"))
            place += 1
        place += 1
    axes.set_yticks(*zip(*labels, strict=True), fontsize="small")
    axes.invert_yaxis()
    axes.set(title=operator, xlabel="ms, logarithmic (black mark: the limit measured in the run)")
    axes.set_xscale("log")
    with rc_context({"svg.hashsalt": operator}):  # the same rows give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})
