"""`python -m benchmarks [OPERATOR ...] [--device cpu] [--seconds 5] [--out FOLDER]`"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance
from benchmarks.measure import measure_ceiling
from benchmarks.registry import load_cases
from benchmarks.run import run_case


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table and writes `<folder>/<device>.jsonl`; returns 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="all if none is named")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=None, help="cuda if there is one"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each case")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the rows")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        cases = load_cases(options.operators)
    except ValueError as error:
        parser.error(str(error))
    origin = provenance.collect(device)
    ceiling = measure_ceiling(device)
    rows = []
    for case in cases:
        for row in run_case(case, device, ceiling, options.seconds):
            rows.append(row | {"provenance": origin})
            print(table_line(row), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (options.out / f"{device}.jsonl").write_text(text)
    return int(any("wrong" in row for row in rows))


def table_line(row: dict[str, Any]) -> str:
    """One row for people."""
    name = f"{row['operator']:18} {row['case']:20} {row['provider']:18}"
    if "wrong" in row:
        return f"{name} WRONG: {row['wrong']}"
    memory = row["peak_memory_bytes"]
    used = "" if memory is None else f"{memory / 2**20:9.1f} MiB"
    spread = f"({row['p20_ms']:.2f} to {row['p80_ms']:.2f})"
    speedup = "" if row["speedup"] is None else f"{row['speedup']:6.2f}x"
    times = f"{row['median_ms']:9.2f} ms {spread:20} {speedup}"
    return f"{name} {times} {used} {row['percent_of_ceiling']:5.1f} % of ceiling"


if __name__ == "__main__":
    sys.exit(main())
