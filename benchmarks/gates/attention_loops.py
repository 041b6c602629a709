"""`python -m benchmarks.gates.attention_loops --out FILE`: what rel_pos_attention's Triton kernels should take on an H200.

Each kernel is compiled for sm_90 with its default tile, by the Triton that is installed; rows of another Triton, and of an
earlier state of the code, stay in the file. `expected_us` says how long a kernel should take by what is counted.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance
from benchmarks.report.results import markdown
from refsam_kernels.core.triton_aot import compile_ahead
from refsam_kernels.rel_pos_attention.triton.cases import launches_of
from refsam_kernels.rel_pos_attention.triton.launches import Problem, Tile

GRID, ARCHITECTURE = 64, 90
HEADS = {64: 12, 80: 16}  # ViT-B and ViT-H, by channels of a head
WINDOWS = (14, GRID)
# Channels of a head, heads, and blocks with global attention.
GLOBAL = (("ViT-B", 64, 12, 4), ("ViT-L", 64, 16, 4), ("ViT-H", 80, 16, 4))
KERNELS = ("forward", "query gradient", "key gradient")
PRODUCTS = {"forward": 2, "query gradient": 3, "key gradient": 4}  # of all pairs, in a kernel
# An H200: multiprocessors, cycles in a microsecond, instructions and operations of bfloat16 products in a cycle of one of them.
PROCESSORS, CYCLES, ISSUED, OPERATIONS = 132, 1755, 4, 4096
L2_BYTES = 5.5e6  # in a microsecond; assumed, no figure of the vendor
SLACK = 1.25


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each kernel; with --out its row replaces the one of the same Triton in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates.attention_loops")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args(arguments)
    rows = list(compiled())
    for row in rows:
        print(
            f"{row['kernel']:15} {row['head_dim']} {row['window']:3} {expected_us(row):6.0f} us {row}"
        )
    if options.out:
        write(rows, options.out)
    return 0


def compiled() -> Iterator[dict[str, Any]]:
    """A row for each kernel, number of channels and window."""
    import triton

    for head_dim, heads in HEADS.items():
        for window in WINDOWS:
            sizes = (1, GRID, GRID, heads, head_dim, window, window)
            problem = Problem(*sizes, "bias", torch.bfloat16, ARCHITECTURE)
            launches = dict(launches_of(problem))
            for kernel in KERNELS:
                found = compile_ahead(launches[kernel].compile_case(kernel), ARCHITECTURE)
                tile = problem.tile(kernel.replace(" ", "_"))
                yield {
                    "state": "after",
                    "triton": triton.__version__,
                    "kernel": kernel,
                    "head_dim": head_dim,
                    "window": window,
                    "tile": [tile.block, tile.rows, tile.columns, tile.num_warps, tile.num_stages],
                    "registers": found.registers,
                    "spill_bytes": found.spill_bytes,
                    "shared_bytes": found.shared_bytes,
                    "loops": [found.loop_instructions],
                    "waits": list(found.waits),
                }


def expected_us(row: Mapping[str, Any]) -> float:
    """Microseconds of a kernel on one image: a quarter more than the longest of its times. Waits for memory are not in it."""
    return SLACK * max(times_us(row))


def times_us(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Microseconds of issuing the loop's instructions, of multiplying, and of reading tiles through the L2, on one image."""
    tile, window, head_dim = Tile(*row["tile"]), row["window"], row["head_dim"]
    windows = HEADS[head_dim] * (-(-GRID // window)) ** 2
    queries = -(-window * window // tile.block)
    keys = -(-window // tile.rows) * -(-window // tile.columns)
    steps = windows * queries * keys
    instructions = sum(row["loops"]) / len(row["loops"]) * tile.num_warps
    issuing = steps * instructions / (PROCESSORS * ISSUED * CYCLES)
    pairs = tile.block * tile.rows * tile.columns
    operations = 2 * PRODUCTS[row["kernel"]] * pairs * head_dim
    multiplying = steps * operations / (PROCESSORS * OPERATIONS * CYCLES)
    reading = steps * bytes_of_step(row["kernel"], tile, head_dim) / L2_BYTES
    return issuing, multiplying, reading


def bytes_of_step(kernel: str, tile: Tile, head_dim: int) -> int:
    """Bytes that a program reads, and the queries' gradient writes, for a tile of queries and one of keys."""
    if (
        kernel == "key gradient"
    ):  # queries, their gradients, and of each the terms and two statistics
        return tile.block * (2 * 2 * head_dim + 4 * (tile.columns + tile.rows + 2))
    terms = 4 * tile.block * tile.rows * (2 if kernel == "query gradient" else 1)
    return tile.rows * tile.columns * 2 * 2 * head_dim + terms


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Replaces the rows of this state and Triton in the file."""
    known = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    mine = {(row["state"], row["triton"]) for row in rows}
    kept = [row for row in known["rows"] if (row["state"], row["triton"]) not in mine]
    order = ("kernel", "head_dim", "window", "state", "triton")
    merged = sorted([*kept, *rows], key=lambda row: [row[name] for name in order])
    lines = ",\n".join(json.dumps(row) for row in merged)
    origin = provenance.collect("cpu") | {"before": known.get("provenance", {}).get("before")}
    path.write_text(f'{{"provenance": {json.dumps(origin)},\n"rows": [\n{lines}\n]}}\n')


def table(result: Mapping[str, Any]) -> str:
    """Before and after, with the newer Triton and in brackets the older one, beside an empty column for what a GPU will show."""
    newest, oldest = (pick(row["triton"] for row in result["rows"]) for pick in (max, min))
    names = ("kernel", "head_dim", "window")
    known = {
        (row["state"], row["triton"], *(row[name] for name in names)): row for row in result["rows"]
    }
    lines = []
    for after in of_newest(result):
        place = [after[name] for name in names]
        before, older = known["before", newest, *place], known["after", oldest, *place]
        pair = (before, after)
        attention = "global" if after["window"] == GRID else f"windows of {after['window']}"
        loops = " → ".join(" to ".join(map(str, sorted(row["loops"]))) for row in pair)
        used = [f"{before[n]} → {after[n]} ({older[n]})" for n in ("registers", "spill_bytes")]
        cells = [
            " → ".join(" x ".join(map(str, row["tile"][:3])) for row in pair),
            f"{loops} ({older['loops'][0]})",
            *used,
            f"{before['waits'][0]} → {after['waits'][0]} ({older['waits'][0]})",
            " → ".join(f"{expected_us(row):.0f}" for row in pair),
        ]
        lines.append([after["kernel"], attention, str(after["head_dim"]), *cells, ""])
    header = (
        "kernel | attention | channels | tile: queries x rows x columns of keys | instructions in the loop"
        " | registers | bytes spilled | copies under way at a wait | expected, µs | measured, µs"
    )
    origin = result["provenance"]
    commits = f"before: commit {origin['before']}, after: {origin['commit'][:7]}"
    note = f"One image of {GRID} x {GRID} tokens, bfloat16, sm_90, Triton {newest} (in brackets {oldest}); {commits}."
    return markdown(header, lines, note, text=2)


def hopper_table(result: Mapping[str, Any]) -> str:
    """The times of global attention's forward, and what a kernel that waits for nothing but its products would save."""
    rows = {(row["head_dim"], row["window"], row["kernel"]): row for row in of_newest(result)}
    lines = []
    for model, head_dim, heads, blocks in GLOBAL:
        row = rows[head_dim, GRID, "forward"]
        share = heads / HEADS[head_dim]
        times = [share * time for time in times_us(row)]
        saved = SLACK * (max(times) - times[1])
        cells = [f"{time:.0f}" for time in (*times, SLACK * max(times), SLACK * times[1])]
        lines.append([model, *cells, f"{1e-3 * blocks * saved:.2f}"])
    header = (
        "model | issuing, µs | multiplying, µs | reading through L2, µs | expected, µs"
        " | by products alone, µs | saved in all global blocks, ms"
    )
    note = (
        "One global block's forward of one image, bfloat16, sm_90, counted as in the table above."
    )
    return markdown(header, lines, note)


def of_newest(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of today's code with the newest Triton."""
    newest = max(row["triton"] for row in result["rows"])
    return [r for r in result["rows"] if r["triton"] == newest and r["state"] == "after"]


if __name__ == "__main__":
    sys.exit(main())
