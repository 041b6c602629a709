"""`python -m benchmarks.report.tables [--check]`: writes the tables of README and docs from the results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is that of a function under `@table`.
"""

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gates.install_matrix import ROWS, read

# They register their tables.
from benchmarks.report import kernel_tables, model_tables, nano_tables, segment_anything_tables  # noqa: F401
from benchmarks.report.results import (
    TABLES,
    failure,
    machine_of,
    markdown,
    mebibytes,
    read_result,
    read_rows,
    spread,
    table,
)

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/evf_sam.md",
    "docs/faster_models.md",
    "docs/platforms.md",
    "docs/status.md",
    "docs/performance.md",
    "docs/training.md",
    "docs/troubleshooting.md",
    "refsam/weights/nano/README.md",
)
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The page's text with every marked table written again."""
    return _REGION.sub(lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], text)


@table
def speed_cpu() -> str:
    """The README's four rows: the encoder in each dtype beside the strongest peer, and a frame of several expressions."""
    rows = read_rows("integrations_cpu")
    encoders = {(row["name"], row["dtype"]): row["median_ms"] for row in rows}
    names = ("segment-anything", "segment-anything, optimize(), cpu")
    times = {
        f"segment-anything's image encoder, {dtype}": [encoders[name, dtype] for name in names]
        for dtype in ("float32", "bfloat16")
    }
    peers, int8 = _peers_and_int8()
    strongest = dict(zip([*times, "int8"], peers, strict=True))
    loop, ours, *_ = read_rows("loop_cpu")
    frame = f"a frame of {ours['expressions']} expressions against one pass for each"
    times[f"{frame}, {ours['dtype']}"] = [loop["median_ms"], ours["median_ms"]]
    cells = []
    for name, (before, after) in times.items():
        seconds = [f"{1e-3 * before:.2f}", f"{1e-3 * after:.2f}"]
        cells.append((name, *seconds, f"{before / after:.2f}x", strongest.get(name, "")))
    cells.insert(2, ("the same in int8", "", f"{1e-3 * int8:.2f}", "", strongest["int8"]))
    header = "SAM ViT-B, 1024 pixels, two CPU cores | before, s | refsam, s | speed-up | strongest peer, in time of refsam"
    return markdown(header, cells)


def _peers_and_int8() -> tuple[list[str], float]:
    """The strongest peer of each dtype of `int8_cpu`, as a share of refsam's time in that run, and our int8's milliseconds."""
    rows = [
        row
        for row in read_rows("int8_cpu")
        if "median_ms" in row and _int8_setting(row) == ("vit_b", 2, False, "")
    ]
    best = []
    for dtype in ("float32", "bfloat16", "int8"):
        peers = [row for row in rows if row["dtype"] == dtype and row["name"] != "refsam"]
        peer = min(peers, key=lambda row: row["median_ms"])
        ours = next(row for row in rows if (row["name"], row["dtype"]) == ("refsam", dtype))
        best.append(f"{peer['median_ms'] / ours['median_ms']:.2f}x ({peer['name']})")
    return best, ours["median_ms"]


@table
def evf_cpu() -> str:
    result = read_result("evf_cpu")
    rows = [
        ("a frame, one expression, s", f"{result['frame_1_s']:.1f}"),
        ("a frame, four expressions, s", f"{result['frame_4_s']:.1f}"),
        ("the same by one whole pass per expression, s", f"{result['per_expression_4_s']:.1f}"),
        ("BEiT-3 for each expression and frame, ms", f"{1e3 * result['beit3_1_s']:.0f}"),
        ("peak memory of the process, GiB", f"{result['peak_rss_bytes'] / 2**30:.1f}"),
    ]
    what = f"ViT-H and BEiT-3 large, random weights, 1280 x 720, {result['dtype']}"
    return markdown(" | measured", rows, f"{what}, {_machine(result)}.")


def _machine(origin: dict[str, Any]) -> str:
    return f"{machine_of(origin, 'threads')}, commit {origin['commit'][:7]}"


@table
def encoder_cpu() -> str:
    rows = read_rows("encoder_cpu")
    baseline = {row["dtype"]: row for row in rows if row["name"] == "segment-anything"}
    header = (
        " | | median (p20 to p80), s | against segment-anything | memory, MiB | against it | error"
    )
    origin = rows[0]["provenance"]
    what = (
        f"{origin['model']}, {origin['image_size']} pixels, one image, {rows[0]['rounds']} rounds"
    )
    lines = (_encoder_line(row, baseline[row["dtype"]]) for row in rows)
    return markdown(header, lines, f"{what}, {_machine(origin)}.", text=2)


def _encoder_line(row: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    name = [row["dtype"], row["name"]]
    if problem := failure(row):
        return [*name, problem, "", "", "", ""]
    memory, whole = row["peak_memory_bytes"], baseline["peak_memory_bytes"]
    share = (
        ["", ""]
        if memory is None or not whole
        else [mebibytes(memory), f"{100 * memory / whole:.0f} %"]
    )
    return [*name, spread(row, 1e-3), f"{row['speedup']:.2f}x", *share, f"{row['error']:.0e}"]


@table
def int8_cpu() -> str:
    """The encoder in each dtype against OpenVINO and ONNX Runtime; speed-ups over our float32 of the same shape."""
    rows = read_rows("int8_cpu")
    ours = {
        _int8_setting(row): row["median_ms"]
        for row in rows
        if (row["name"], row["dtype"]) == ("refsam", "float32") and "median_ms" in row
    }
    lines = [_int8_line(row, ours) for row in rows]
    origin = rows[0]["provenance"]
    header = "encoder | threads | frame | dtype | of | median (p20 to p80), s | refsam float32 takes | error | memory, MiB"
    machine = f"{origin['hardware']['processor']}, torch {origin['versions']['torch']}"
    note = (
        f"{rows[0]['image_size']} pixels, one image, random weights, {machine}. Error: mean difference to segment-anything in "
        "float32 over the mean size. Memory is that above the weights."
    )
    return markdown(header, lines, note, text=5)


def _int8_setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["threads"], row["wide"], row.get("instruction_set", "")


def _int8_line(row: dict[str, Any], ours: dict[tuple[Any, ...], float]) -> list[str]:
    frame = "16:9, no padding" if row["wide"] else "square"
    chosen = row.get("instruction_set", "")
    of = f"{row['name']}, {chosen}" if chosen else row["name"]
    name = [row["model"], str(row["threads"]), frame, row["dtype"], of]
    if problem := failure(row):
        return [*name, problem, "", "", ""]
    baseline = ours.get(_int8_setting(row))
    speedup = f"{baseline / row['median_ms']:.2f}x" if baseline else ""
    error = "" if row["error"] is None else f"{100 * row['error']:.2g} %"
    memory = row.get("peak_memory_bytes")
    return [*name, spread(row, 1e-3), speedup, error, mebibytes(memory) if memory else ""]


@table
def int8_accuracy() -> str:
    """nano's scores in float32, int8 and with frames filled up to squares, and the errors of the last block."""
    result = read_result("int8_accuracy")
    each = [result[name] for name in ("float32", "int8", "float32, squares")]
    every = "all frames" if result["every"] == 1 else f"one frame in {result['every']}"
    davis = [r["davis"]["summary"] for r in each]
    rows = [
        [f"four DAVIS sequences, {every}, mean J", *(f"{r['J']:.3f}" for r in davis)],
        ["falsely marked share", *(f"{r['false_area']:.4f}" for r in davis)],
        [
            f"the first {result['clips']} frozen clips, mean J&F",
            *(f"{r['generated']['accuracy']['everything']['J&F']:.3f}" for r in each),
        ],
    ]
    for name in ("nano", "vit_b, random weights"):
        last = result[name][-1]["up_to_it"]
        rows.append(
            [f"tokens behind the last block, relative error ({name})", "0", f"{last:.3f}", ""]
        )
    return markdown(" | float32 | int8 | float32, frames filled up to squares", rows)


@table
def integrations_cpu() -> str:
    """Each library's encoder before and after `optimize()`, by the best backend."""
    rows = {(row["name"], row["dtype"]): row for row in read_rows("integrations_cpu")}
    lines = [
        [name, dtype, *_before_and_after(before, rows[f"{name}, optimize(), cpu", dtype])]
        for (name, dtype), before in rows.items()
        if (f"{name}, optimize(), cpu", dtype) in rows
    ]
    origin = next(iter(rows.values()))["provenance"]
    what = f"{origin['model']}, {origin['image_size']} pixels, one image"
    note = f"{what}, {_machine(origin)}. Memory is that above the weights."
    header = "image encoder of | dtype | before, s | after, s | as fast | memory, MiB | after"
    return markdown(header, lines, note, text=2)


def _before_and_after(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    if problem := failure(before) or failure(after):
        return [problem, "", "", "", ""]
    times = [1e-3 * row["median_ms"] for row in (before, after)]
    memory = [mebibytes(row["peak_memory_bytes"]) for row in (before, after)]
    return [f"{times[0]:.2f}", f"{times[1]:.2f}", f"{times[0] / times[1]:.2f}x", *memory]


@table
def operators_cpu() -> str:
    rows = read_rows("rel_pos_attention_cpu") + read_rows("masks_cpu")
    lines = (
        (
            f"{row['operator'].removesuffix('_cpu')}, {row['case']}",
            row["provider"],
            spread(row),
            f"{row['speedup']:.2f}x",
            mebibytes(row["peak_memory_bytes"], 1),
        )
        for row in rows
    )
    memory = "Memory is what a call needs in addition to its inputs, including its result."
    note = f"{machine_of(rows[0]['provenance'], 'threads')}. {memory}"
    return markdown(
        " | | median (p20 to p80), ms | against the first | memory, MiB", lines, note, text=2
    )


@table
def ui_cpu() -> str:
    result = read_result("ui_cpu")
    rows = {
        "first page after `refsam ui`, s": "first_page_seconds",
        "first overlay of a 720p clip after the button, s": "first_overlay_seconds",
        "model loaded after `refsam ui`, s": "model_seconds",
    }
    lines = ((what, f"{result['medians'][key]:.2f}") for what, key in rows.items())
    conditions = f"{machine_of(result, 'cores')}, the browser on the same machine, medians of {len(result['runs'])} runs."
    return markdown(" | measured", lines, conditions)


@table
def frame_cpu() -> str:
    result = read_result("frame_cpu")
    lines = ((name, f"{value:.1f}") for name, value in result["medians"].items())
    what = f"nano, one expression, 720p, medians of {len(result['runs'])} runs"
    note = f"{what}, {machine_of(result, 'cores')}, commit {result['commit'][:7]}."
    return markdown("core-milliseconds of a frame | measured", lines, note)


@table
def memory_cpu() -> str:
    result = read_result("memory_cpu")
    rows, growth = result["rows"], result["growth"]["host_mib_for_each_thousand_frames"]
    first, last = rows[min(9, len(rows) - 1)], rows[-1]
    return (
        f"Resident memory after {first['frames']} frames: {first['host_mib']:.0f} MiB; after {last['frames']}: "
        f"{last['host_mib']:.0f} MiB; by least squares {growth:+.2f} MiB for each thousand frames.\n\n"
        f"nano, two expressions, everything written, {machine_of(result, 'cores')}.\n\n"
        "![Resident memory over the frames](images/memory.svg)"
    )


@table
def loop_cpu() -> str:
    rows = read_rows("loop_cpu")
    header = " | dtype | a frame (p20 to p80), s | frames/s | against the loop | encoder, s | decoder, s | rest, %"
    origin = rows[0]["provenance"]
    height, width = rows[0]["frame_size"]
    what = f"{origin['model']} at {origin['image_size']} pixels, {rows[0]['expressions']} expressions, {width} x {height}"
    note = f"{what}, {rows[0]['rounds']} rounds, {_machine(origin)}."
    return markdown(header, map(_loop_line, rows), note, text=2)


def _loop_line(row: dict[str, Any]) -> list[str]:
    name = [row["provider"], row["dtype"]]
    if problem := failure(row):
        return [*name, problem, "", "", "", "", ""]
    rate = f"{1e3 / row['median_ms']:.3f}"
    parts = ["", "", ""]
    if "encoder_ms" in row:
        parts = [f"{1e-3 * row[key]:.2f}" for key in ("encoder_ms", "decoder_ms")]
        parts.append(f"{row['overhead_percent']:.1f}")
    return [*name, spread(row, 1e-3), rate, f"{row['speedup']:.2f}x", *parts]


@table
def expressions_cpu() -> str:
    rows = read_rows("expressions_cpu")
    lines = []
    for row in rows:
        problem = failure(row)
        found = [problem, ""] if problem else [spread(row, 1e-3), f"{row['times_one']:.3f}"]
        lines.append([row["dtype"], str(row["expressions"]), *found])
    origin = rows[0]["provenance"]
    what = f"{origin['model']} at {origin['image_size']} pixels, a 720p frame to masks of its size"
    header = "encoder's products | expressions | a frame (p20 to p80), s | times one"
    return markdown(header, lines, f"{what}, {_machine(origin)}.")


@table
def bench_cpu() -> str:
    rows = read_rows("bench/cpu")
    header = " | | median (p20 to p80), ms | against the first | of the limit | memory, MiB"
    return markdown(header, map(_bench_line, rows), f"{_machine(rows[0]['provenance'])}.", text=2)


def _bench_line(row: dict[str, Any]) -> list[str]:
    ceiling = ", does less: a limit" if row.get("is_ceiling") else ""
    name = [f"{row['operator']}, {row['case']}", f"{row['provider']}{ceiling}"]
    if problem := failure(row):
        return [*name, problem, "", "", ""]
    speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
    memory = row["peak_memory_bytes"]
    limits = [f"{row['percent_of_ceiling']:.0f} %"]
    if not ceiling:
        limits += [f"{share:.0f} % of {other}" for other, share in row["percent_of"].items()]
    used = "" if memory is None else mebibytes(memory, 1)
    return [*name, spread(row), speedup, ", ".join(limits), used]


@table
def errors() -> str:
    """The messages that users meet, from docs/errors.yaml, by what they are about."""
    lines = []
    for group in yaml.safe_load((ROOT / "docs" / "errors.yaml").read_text(encoding="utf-8")):
        lines += [f"### {group['group']}", "", "| it says | because | do |", "|---|---|---|"]
        for error in group["errors"]:
            says = re.sub(r"\{[^}]*\}", "...", error["says"]).replace("|", "\\|")
            lines.append(f"| `{says}` | {error['why']} | {error['do']} |")
        lines.append("")
    return "\n".join(lines)


@table
def install_matrix() -> str:
    """All rows of `make install-matrix`, those that were not run too."""
    found, lines = read(), []
    untried = {"state": "not run", "detail": "not tried: a row takes minutes of a machine"}
    for row in ROWS:
        entry = found.get(row.name, untried)
        cells = (row.python, row.torch or "none", row.condition, entry["state"], entry["detail"])
        lines.append([cell.replace("|", ";") for cell in cells])
    return markdown("Python | torch | condition | result | what it said", lines, text=5)


@table
def training_cpu() -> str:
    result = read_result("training_cpu")
    baseline = result["rows"][0]
    header = "a training step on | median (p20 to p80), s | steps/s | as fast | step, MiB | process, MiB | against the first"
    lines = (_training_line(row, baseline) for row in result["rows"])
    what = f"{result['model']}, {result['image_size']} pixels, one clip of {result['frames']} frames, one expression, float32"
    return markdown(header, lines, f"{what}, {_machine(result)}.")


def _training_line(row: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    if problem := failure(row):
        return [row["name"], problem, "", "", "", "", ""]
    memory, kinds = ["", "", ""], ("step_memory_bytes", "process_memory_bytes")
    if row[kinds[0]] is not None:
        shares = [f"{100 * row[kind] / baseline[kind]:.0f} %" for kind in kinds]
        memory = [*(mebibytes(row[kind]) for kind in kinds), " and ".join(shares)]
    speed = [f"{row['steps_per_second']:.3f}", f"{row['speedup']:.2f}x"]
    return [row["name"], spread(row, 1e-3), *speed, *memory]


def main(arguments: list[str]) -> int:
    """Rewrites the pages; with --check only says which are out of date, and returns 1 if any is."""
    stale = []
    for path in (ROOT / page for page in PAGES):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if (filled := fill(text)) != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in arguments:
                path.write_text(filled, encoding="utf-8")
    print(f"out of date: {', '.join(stale) or 'nothing'}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
