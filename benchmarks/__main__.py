"""`python -m benchmarks [OPERATOR ...] [--short] [--device cpu] [--seconds 5] [--out FOLDER]`, or `--compare BEFORE AFTER`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance
from benchmarks.measure import exact_products, measure_ceiling
from benchmarks.registry import load_cases
from benchmarks.report import compare
from benchmarks.report.plots import write_plots
from benchmarks.run import run_case


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table, writes `<folder>/<device>.jsonl` and plots; returns 1 if a result was wrong.

    With --compare it measures nothing, and returns 1 if something became slower. It returns 2 for impossible arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="all if none is named")
    parser.add_argument("--short", action="store_true", help="a few minutes' choice of the cases")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=None, help="cuda if there is one"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each case")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the rows")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument(
        "--threshold",
        type=float,
        default=10.0,
        help="accept a provider that became slower by up to this percentage",
    )
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            before, after = options.compare
            return compare.report(before, after, options.threshold)
        return measure(options)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> int:
    """Measures the named cases; returns 1 for a wrong result, raises ValueError for an unknown operator or device."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, wanted cpu: torch sees no CUDA device here")
    cases = load_cases(options.operators, device, short=options.short)
    exact_products()
    origin = provenance.collect(device)
    ceiling = measure_ceiling(device)
    print(f"limits measured on {device}: {ceiling}", flush=True)
    rows = []
    for case in cases:
        for row in run_case(case, device, ceiling, options.seconds):
            rows.append(row | {"provenance": origin})
            print(table_line(row), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{device}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}; {write_plots(rows, options.out)}")
    return int(any("wrong" in row for row in rows))


def table_line(row: dict[str, Any]) -> str:
    """One row as a line to print."""
    name = f"{row['operator']:18} {row['case']:20} {row['provider']:18}"
    if "skipped" in row:
        return f"{name} skipped: {row['skipped']}"
    if "wrong" in row:
        return f"{name} WRONG: {row['wrong']}"
    memory = row["peak_memory_bytes"]
    used = "" if memory is None else f"{memory / 2**20:9.1f} MiB"
    spread = f"({row['p20_ms']:.2f} to {row['p80_ms']:.2f})"
    speedup = "" if row["speedup"] is None else f"{row['speedup']:6.2f}x"
    times = f"{row['median_ms']:9.2f} ms {spread:20} {speedup}"
    limits = [f"{row['percent_of_ceiling']:5.1f} % of the limit"]
    limits += [f"{share:.0f} % of {name}" for name, share in row["percent_of"].items()]
    return f"{name} {times} {used} {', '.join(limits)}"


if __name__ == "__main__":
    sys.exit(main())
