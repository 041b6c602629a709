"""`python -m benchmarks.gates.compile_gate [OPERATOR ...] [--out FILE]`: compile every Triton kernel without a GPU."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import provenance
from refsam_kernels.core.triton_aot import (
    ARCHITECTURES,
    CompilationError,
    CompileCase,
    cases_of,
    compile_ahead,
    operators_with_triton,
)


def main(arguments: list[str] | None = None) -> int:
    """Prints a table of registers, shared memory and spills; returns 1 if a case fails to compile or spills too much.

    With --out the rows of the operators and architectures named, or of all, replace those in the file; others stay.
    The file says which Triton it was: results/compile_gate.json is the pinned one's, compile_gate_oldest.json that of 3.6.
    """
    known = operators_with_triton()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gates.compile_gate", description=main.__doc__
    )
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="all if none is named")
    parser.add_argument("--architecture", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.operators) - set(known))
    if unknown:
        parser.error(f"operator: got {', '.join(unknown)}, wanted some of {', '.join(known)}")
    operators = options.operators or known
    rows = []
    for operator in operators:
        for row in compile_operator(operator, options.architecture or ARCHITECTURES):
            rows.append(row)
            print(table_line(row), flush=True)
    if options.out:
        write(rows, operators, options.architecture or ARCHITECTURES, options.out)
    return int(any("wrong" in row for row in rows))


def compile_operator(operator: str, architectures: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A row for every shipped configuration and architecture."""
    for case in cases_of(operator):
        for architecture in architectures:
            if architecture in case.architectures:
                row = {"operator": operator, "case": case.name, "architecture": architecture}
                row |= {"num_warps": case.num_warps, "num_stages": case.num_stages}
                yield row | judge(case, architecture)


def judge(case: CompileCase, architecture: int) -> dict[str, Any]:
    """The resources of a case, and `wrong` in words if it must not be shipped."""
    try:
        resources = compile_ahead(case, architecture)
    except CompilationError as error:
        return {"wrong": str(error)}
    judged = asdict(resources)
    if case.spill_limit is not None and resources.spill_bytes > case.spill_limit:
        judged["wrong"] = f"spills {resources.spill_bytes} bytes, at most {case.spill_limit} may"
    return judged


def table_line(row: dict[str, Any]) -> str:
    """One row for people."""
    name = f"{row['operator']:22} {row['case']:44} sm_{row['architecture']:<4}"
    used = ""
    if "registers" in row:
        used = f"{row['registers']:4} registers {row['shared_bytes']:7} B shared"
        used += f" {row['spill_bytes']:5} B spilled {row['loop_instructions']:5} in the loop"
    wrong = row.get("wrong", "").partition("\n")[0]
    return f"{name} {used}{' WRONG: ' if wrong else ''}{wrong}"


def write(
    rows: list[dict[str, Any]], operators: list[str], architectures: Sequence[int], path: Path
) -> None:
    """Replaces the rows of these operators and architectures in the file."""
    origin = provenance.collect("cpu")
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    kept = [
        row
        for row in kept
        if row["operator"] not in operators or row["architecture"] not in architectures
    ]
    merged = sorted(kept + [row | {"commit": origin["commit"]} for row in rows], key=row_order)
    lines = ",\n".join(json.dumps(row) for row in merged)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"provenance": {json.dumps(origin)},\n"rows": [\n{lines}\n]}}\n')


def row_order(row: dict[str, Any]) -> tuple[str, str, int]:
    """Rows in the file are ordered by operator, case and architecture."""
    return row["operator"], row["case"], row["architecture"]


if __name__ == "__main__":
    sys.exit(main())
