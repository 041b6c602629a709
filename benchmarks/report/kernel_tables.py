"""Tables of compiled kernels: registers and spills, and the time that attention's loops should take."""

from typing import Any

from benchmarks.report.results import markdown, read_result, table


@table
def cuda_resources() -> str:
    result = read_result("cuda_resources")
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        kernels.setdefault((row["source"], row["kernel"].partition("<")[0]), []).append(row)
    lines = []
    for (source, kernel), rows in kernels.items():
        variants = len({row["kernel"] for row in rows})
        registers = [row["registers"] for row in rows]
        used = f"{min(registers)} to {max(registers)}"
        spilled = max(row["spill_bytes"] for row in rows)
        lines.append((f"`{source}`", f"`{kernel}`", str(variants), used, str(spilled)))
    targets = ", ".join(
        f"sm_{each}" for each in sorted({row["architecture"] for row in result["rows"]})
    )
    origin = result["provenance"]
    note = f"{targets}; {origin['nvcc']}, commit {origin['commit'][:7]}."
    return markdown(
        "source | kernel | variants | registers | most bytes spilled", lines, note, text=2
    )


@table
def attention_loops() -> str:
    from benchmarks.gates.attention_loops import table

    return table(read_result("attention_loops"))
