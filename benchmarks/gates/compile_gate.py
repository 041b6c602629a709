"""`python -m benchmarks.gates.compile_gate [OPERATOR ...] [--out FILE]`: compile every Triton kernel without a GPU."""

import argparse
import hashlib
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

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Prints a table of registers, shared memory and spills; returns 1 if a case fails to compile or spills too much.

    With --out the rows of the operators and architectures named, or of all, replace those in the file as they are found; others
    stay. With --resume rows are not made again that the same Triton made of the same source and arguments.
    The file says which Triton it was: results/compile_gate.json is the pinned one's, compile_gate_oldest.json that of 3.6.
    """
    known = operators_with_triton()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gates.compile_gate", description=main.__doc__
    )
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="all if none is named")
    parser.add_argument("--architecture", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--resume", action="store_true", help="go on where an ended run stopped")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.operators) - set(known))
    if unknown:
        parser.error(f"operator: got {', '.join(unknown)}, wanted some of {', '.join(known)}")
    file = RowsFile(options.out, provenance.collect("cpu"))
    planned = list(planned_rows(options.operators or known, options.architecture or ARCHITECTURES))
    file.forget_others([row for row, _ in planned])
    rows = []
    for names, case in planned:
        row = options.resume and file.made_before(names)
        if not row:
            row = names | judge(case, names["architecture"])
            file.put(row)
        rows.append(row)
        print(table_line(row), flush=True)
    return int(any("wrong" in row for row in rows))


def planned_rows(
    operators: Sequence[str], architectures: Sequence[int]
) -> Iterator[tuple[Row, CompileCase]]:
    """The names of a row, and its case, for every shipped configuration and architecture."""
    for operator in operators:
        for case in cases_of(operator):
            for architecture in architectures:
                if architecture in case.architectures:
                    row = {"operator": operator, "case": case.name, "architecture": architecture}
                    row |= {"num_warps": case.num_warps, "num_stages": case.num_stages}
                    yield row | {"key": key_of(case)}, case


def key_of(case: CompileCase) -> str:
    """A digest of Triton's version, the kernel's source with all that it calls, and the arguments."""
    import triton

    source = getattr(case.kernel, "cache_key", None)
    parts = (triton.__version__, source, case.signature, case.constants, case.precision)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def judge(case: CompileCase, architecture: int) -> Row:
    """The resources of a case, and `wrong` in words if it must not be shipped."""
    try:
        resources = compile_ahead(case, architecture)
    except CompilationError as error:
        return {"wrong": str(error)}
    judged = asdict(resources)
    if case.spill_limit is not None and resources.spill_bytes > case.spill_limit:
        judged["wrong"] = f"spills {resources.spill_bytes} bytes, at most {case.spill_limit} may"
    return judged


def table_line(row: Row) -> str:
    """One row as a line to print."""
    name = f"{row['operator']:22} {row['case']:44} sm_{row['architecture']:<4}"
    used = ""
    if "registers" in row:
        used = f"{row['registers']:4} registers {row['shared_bytes']:7} B shared"
        used += f" {row['spill_bytes']:5} B spilled {row['loop_instructions']:5} in the loop"
    wrong = row.get("wrong", "").partition("\n")[0]
    return f"{name} {used}{' WRONG: ' if wrong else ''}{wrong}"


class RowsFile:
    """The rows in a JSON file, by operator, case and architecture; no file without a path."""

    def __init__(self, path: Path | None, origin: Row) -> None:
        self.path, self.origin = path, origin
        known = json.loads(path.read_text())["rows"] if path and path.is_file() else []
        self.rows: dict[tuple[str, str, int], Row] = {row_order(row): row for row in known}

    def forget_others(self, planned: Sequence[Row]) -> None:
        """Drops rows of the planned operators and architectures whose cases are gone."""
        places = {(row["operator"], row["architecture"]) for row in planned}
        cases = {row_order(row) for row in planned}
        self.rows = {
            key: row
            for key, row in self.rows.items()
            if key in cases or (key[0], key[2]) not in places
        }

    def made_before(self, names: Row) -> Row | None:
        """The row with these names, the key of what is compiled among them."""
        row = self.rows.get(row_order(names))
        return row if row and names.items() <= row.items() else None

    def put(self, row: Row) -> None:
        """Adds a row, and writes the file."""
        self.rows[row_order(row)] = row | {"commit": self.origin["commit"]}
        if self.path:
            rows = (self.rows[key] for key in sorted(self.rows))
            provenance.write_json(self.path, self.origin, rows)


def row_order(row: Row) -> tuple[str, str, int]:
    """Rows in the file are ordered by operator, case and architecture."""
    return row["operator"], row["case"], row["architecture"]


if __name__ == "__main__":
    sys.exit(main())
