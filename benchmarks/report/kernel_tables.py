"""Tables of compiled kernels: registers and spills, and the time that attention's loops should take on an H200."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.report.results import markdown, read_result, table

if TYPE_CHECKING:
    from refsam_kernels.rel_pos_attention.triton.launches import Tile

GRID, ARCHITECTURE = 64, 90
WINDOWS = (14, GRID)
# Channels of a head, heads, and blocks with global attention.
MODELS = {"ViT-B": (64, 12, 4), "ViT-L": (64, 16, 4), "ViT-H": (80, 16, 4)}
HEADS = {64: 12, 80: 16}  # ViT-B and ViT-H, by channels of a head
PRODUCTS = {"forward": 2, "key gradient": 4, "query gradient": 3}  # of all pairs, in a kernel
# An H200: multiprocessors, cycles in a microsecond, instructions and operations of bfloat16 products in a cycle of one of them.
PROCESSORS, CYCLES, ISSUED, OPERATIONS = 132, 1755, 4, 4096
L2_BYTES = 5.5e6  # in a microsecond; assumed, no figure of the vendor
SLACK = 1.25

Case = tuple[str, int, int]  # kernel, channels of a head, window


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
    """The loops of attention's Triton kernels by both Tritons, beside an empty column for a GPU's times."""
    newest, oldest = read_result("compile_gate"), read_result("compile_gate_oldest")
    lines = []
    for kernel in PRODUCTS:
        for case in ((kernel, head_dim, window) for head_dim in HEADS for window in WINDOWS):
            tile, rows = tile_of(case), [gate_row(gate, case) for gate in (newest, oldest)]
            names = ("loop_instructions", "registers", "spill_bytes")
            counts = [*([row[name] for row in rows] for name in names)]
            counts.append([row["waits"][0] for row in rows])
            lines.append(
                [
                    kernel,
                    "global" if case[2] == GRID else f"windows of {case[2]}",
                    str(case[1]),
                    f"{tile.block} x {tile.rows} x {tile.columns}",
                    *(f"{new} ({old})" for new, old in counts),
                    f"{SLACK * max(times_us(case, rows[0])):.0f}",
                    "",
                ]
            )
    header = (
        "kernel | attention | channels | tile: queries x rows x columns of keys | instructions in the loop"
        " | registers | bytes spilled | copies under way at a wait | expected, µs | measured, µs"
    )
    versions = [gate["provenance"]["versions"]["triton"] for gate in (newest, oldest)]
    triton = "Triton {} (in brackets {})".format(*versions)
    note = f"One image of {GRID} x {GRID} tokens, bfloat16, sm_{ARCHITECTURE}, {triton}."
    return markdown(header, lines, note, text=2)


@table
def attention_hopper() -> str:
    """The times of global attention's forward, and what a kernel that waits for nothing but its products would save."""
    gate, lines = read_result("compile_gate"), []
    for model, (head_dim, heads, blocks) in MODELS.items():
        case = ("forward", head_dim, GRID)
        share = heads / HEADS[head_dim]
        times = [share * time for time in times_us(case, gate_row(gate, case))]
        saved = SLACK * (max(times) - times[1])
        cells = [f"{time:.0f}" for time in (*times, SLACK * max(times), SLACK * times[1])]
        lines.append([model, *cells, f"{1e-3 * blocks * saved:.2f}"])
    header = (
        "model | issuing, µs | multiplying, µs | reading through L2, µs | expected, µs"
        " | by products alone, µs | saved in all global blocks, ms"
    )
    note = f"One global block's forward of one image, bfloat16, sm_{ARCHITECTURE}, counted as in the table above."
    return markdown(header, lines, note)


def gate_row(gate: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """The compile gate's row of a kernel on a grid of 64 x 64 tokens in bfloat16."""
    kernel, head_dim, window = case
    names = {"operator": "rel_pos_attention", "architecture": ARCHITECTURE}
    names |= {"case": f"{kernel} {head_dim} bfloat16 {window} of {GRID}"}
    return next(row for row in gate["rows"] if names.items() <= row.items())


def tile_of(case: Case) -> "Tile":
    """The kernel's default tile."""
    from refsam_kernels.rel_pos_attention.triton.cases import problem_of  # it needs Triton

    kernel, head_dim, window = case
    sizes = (GRID, GRID, window, window)
    problem = problem_of(sizes, head_dim, torch.bfloat16, ARCHITECTURE)
    return problem.tile(kernel.replace(" ", "_"))


def times_us(case: Case, row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Microseconds of issuing the loop's instructions, of multiplying, and of reading tiles through the L2, on one image.

    Waits for memory are not in them.
    """
    (kernel, head_dim, window), tile = case, tile_of(case)
    windows = HEADS[head_dim] * (-(-GRID // window)) ** 2
    queries = -(-window * window // tile.block)
    keys = -(-window // tile.rows) * -(-window // tile.columns)
    steps = windows * queries * keys
    instructions = row["loop_instructions"] * tile.num_warps
    issuing = steps * instructions / (PROCESSORS * ISSUED * CYCLES)
    pairs = tile.block * tile.rows * tile.columns
    operations = 2 * PRODUCTS[kernel] * pairs * head_dim
    multiplying = steps * operations / (PROCESSORS * OPERATIONS * CYCLES)
    return issuing, multiplying, steps * bytes_of_step(case, tile) / L2_BYTES


def bytes_of_step(case: Case, tile: "Tile") -> int:
    """Bytes that a program reads, and the queries' gradient writes, for a tile of queries and one of keys."""
    kernel, head_dim, _ = case
    if kernel == "key gradient":  # queries, their gradients, each one's terms and two statistics
        return tile.block * (2 * 2 * head_dim + 4 * (tile.columns + tile.rows + 2))
    terms = 4 * tile.block * tile.rows * (2 if kernel == "query gradient" else 1)
    return tile.rows * tile.columns * 2 * 2 * head_dim + terms
