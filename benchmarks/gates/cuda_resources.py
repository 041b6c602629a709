"""`python -m benchmarks.gates.cuda_resources [--out FILE]`: compiles every CUDA kernel for every architecture, without a GPU."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import provenance
from refsam_kernels import build, prerequisites

SPILL_LIMIT = 64  # bytes per thread, stored and loaded together


def main(arguments: list[str] | None = None) -> int:
    """Prints registers and spills of each kernel; returns 1 if one spills more than 64 bytes.

    Raises `BuildSkipped` without nvcc, `BuildError` with the compiler's messages.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gates.cuda_resources", description=main.__doc__
    )
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args(arguments)
    plan = build.cuda_plan()
    build.execute(plan)
    rows = sorted(rows_of(plan), key=lambda row: tuple(row.values()))
    for row in rows:
        print(table_line(row))
    if options.out:
        origin = provenance.collect("cpu") | {"nvcc": plan.toolchain["compiler"]}
        provenance.write_json(options.out, origin, rows)
    return int(any(row["spill_bytes"] > SPILL_LIMIT for row in rows))


def rows_of(plan: build.Plan) -> Iterator[dict[str, Any]]:
    """A row for every kernel and architecture of every source."""
    for step in plan.compile:
        found = build.kernel_resources(replace(plan, compile=(step,)))
        names = readable([kernel.kernel for kernel in found])
        for name, kernel in zip(names, found, strict=True):
            yield {
                "source": step.inputs[0].name,
                "kernel": name,
                "architecture": int(kernel.architecture.removeprefix("sm_")),
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_stores + kernel.spill_loads,
            }


def readable(kernels: list[str]) -> list[str]:
    """Mangled names of kernels as function and template arguments, without namespaces and parameters."""
    if not kernels:
        return []
    command = ["c++filt", "--no-params", *kernels]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plain = names.replace("(anonymous namespace)", "").replace("void ", "")
    return [
        re.sub(r"\((int|bool)\)", "", re.sub(r"\w*::", "", name)) for name in plain.splitlines()
    ]


def table_line(row: dict[str, Any]) -> str:
    """One row as a line to print."""
    wrong = f" WRONG: at most {SPILL_LIMIT} may" if row["spill_bytes"] > SPILL_LIMIT else ""
    name = f"{row['source']:32} {row['kernel']:48} sm_{row['architecture']:<4}"
    return f"{name} {row['registers']:4} registers {row['spill_bytes']:5} B spilled{wrong}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (prerequisites.BuildSkipped, prerequisites.BuildError) as reason:
        sys.exit(f"cuda_resources: {reason}")
