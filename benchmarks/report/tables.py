"""`python -m benchmarks.report.tables [--check]`: writes the tables of README and docs from the results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `_TABLES`.
"""

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report.results import machine_of, read_result, read_rows
from benchmarks.report.speed_tables import evf_cpu, speed_cpu

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/evf_sam.md",
    "docs/status.md",
    "docs/performance.md",
    "docs/training.md",
    "docs/troubleshooting.md",
    "refsam/weights/nano/README.md",
)
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The page's text with every marked table made anew."""
    return _REGION.sub(lambda match: match[1] + _table(match[2]) + "\n" + match[3], text)


def _table(name: str) -> str:
    return _TABLES[name]()


def _nano_generated() -> str:
    from refsam.evaluation.runners.generated import table

    return table(read_result("nano_generated")["summary"])


def _nano_real_clips() -> str:
    from benchmarks.end_to_end.real_clips import table

    result = read_result("nano_real_clips")
    lines = [table(result["before"], result["now"]), ""]
    lines.append(f"Before: commit {result['base'][:7]}; now: {result['commit'][:7]}.")
    return "\n".join(lines)


def _nano_davis() -> str:
    from benchmarks.end_to_end.davis import table

    return table(read_result("nano_davis")["rows"])


def _nano_photographs() -> str:
    from benchmarks.end_to_end.photographs import table

    return table(read_result("nano_photographs")["summary"])


def _nano_composites() -> str:
    from benchmarks.end_to_end.composites import table

    return table(read_result("nano_composites"))


def _segment_nano_cpu() -> str:
    speed = read_result("segment_nano_cpu")
    medians = speed["medians"]
    rows = [
        ("`refsam segment`, 720p, frames/s", medians["frames_per_second"]),
        ("first mask after the command, s", medians["first_mask_seconds"]),
    ]
    lines = ["| | measured |", "|---|--:|", *(f"| {what} | {got:.3g} |" for what, got in rows)]
    conditions = f"{machine_of(speed, 'cores')}, one expression, default settings, medians of {len(speed['runs'])} runs."
    return "\n".join([*lines, "", conditions])


def _encoder_cpu() -> str:
    rows = read_rows("encoder_cpu")
    baseline = {row["dtype"]: row for row in rows if row["name"] == "segment-anything"}
    lines = [
        "| | | median (p20 to p80), s | against segment-anything | memory, MiB | against it | error |",
        "|---|---|--:|--:|--:|--:|--:|",
        *(_encoder_line(row, baseline[row["dtype"]]) for row in rows),
    ]
    origin = rows[0]["provenance"]
    machine = machine_of(origin, "threads")
    what = (
        f"{origin['model']}, {origin['image_size']} pixels, one image, {rows[0]['rounds']} rounds"
    )
    return "\n".join([*lines, "", f"{what}, {machine}, commit {origin['commit'][:7]}."])


def _encoder_line(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    name = f"| {row['dtype']} | {row['name']} |"
    for word in ("skipped", "wrong"):
        if word in row:
            return f"{name} {word}: {row[word]} | | | | |"
    seconds, low, high = (1e-3 * row[key] for key in ("median_ms", "p20_ms", "p80_ms"))
    memory, share = row["peak_memory_bytes"], "| |"
    if memory is not None and baseline["peak_memory_bytes"]:
        share = f"{memory / 2**20:.0f} | {100 * memory / baseline['peak_memory_bytes']:.0f} % |"
    return f"{name} {seconds:.2f} ({low:.2f} to {high:.2f}) | {row['speedup']:.2f}x | {share} {row['error']:.0e} |"


def _integrations_cpu() -> str:
    """Each library's encoder before and after `optimize()`, by the best backend."""
    rows = {(row["name"], row["dtype"]): row for row in read_rows("integrations_cpu")}
    lines = [
        "| image encoder of | dtype | before, s | after, s | as fast | memory, MiB | after |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (name, dtype), before in rows.items():
        after = rows.get((f"{name}, optimize(), cpu", dtype))
        if after is not None:
            lines.append(f"| {name} | {dtype} | {_before_and_after(before, after)} |")
    origin = next(iter(rows.values()))["provenance"]
    what = f"{origin['model']}, {origin['image_size']} pixels, one image"
    machine = f"{machine_of(origin, 'threads')}, commit {origin['commit'][:7]}"
    return "\n".join([*lines, "", f"{what}, {machine}. Memory is that above the weights."])


def _before_and_after(before: dict[str, Any], after: dict[str, Any]) -> str:
    for row in (before, after):
        for word in ("skipped", "wrong"):
            if word in row:
                return f"{word}: {row[word]} | | | |"
    times = [1e-3 * row["median_ms"] for row in (before, after)]
    memory = [f"{row['peak_memory_bytes'] / 2**20:.0f}" for row in (before, after)]
    return f"{times[0]:.2f} | {times[1]:.2f} | {times[0] / times[1]:.2f}x | {' | '.join(memory)}"


def _operators_cpu() -> str:
    rows = read_rows("rel_pos_attention_cpu") + read_rows("masks_cpu")
    lines = [
        "| | | median (p20 to p80), ms | against the first | memory, MiB |",
        "|---|---|--:|--:|--:|",
        *(
            f"| {row['operator'].removesuffix('_cpu')}, {row['case']} | {row['provider']} | {row['median_ms']:.2f} "
            f"({row['p20_ms']:.2f} to {row['p80_ms']:.2f}) | {row['speedup']:.2f}x | {row['peak_memory_bytes'] / 2**20:.1f} |"
            for row in rows
        ),
    ]
    origin = rows[0]["provenance"]
    machine = machine_of(origin, "threads")
    return "\n".join(
        [
            *lines,
            "",
            f"{machine}. Memory is what a call needs beside its inputs, its result included.",
        ]
    )


def _ui_cpu() -> str:
    result = read_result("ui_cpu")
    medians = result["medians"]
    lines = [
        "| | measured |",
        "|---|--:|",
        f"| first page after `refsam ui`, s | {medians['first_page_seconds']:.2f} |",
        f"| first overlay of a 720p clip after the button, s | {medians['first_overlay_seconds']:.2f} |",
        f"| model loaded after `refsam ui`, s | {medians['model_seconds']:.2f} |",
        "",
        f"{machine_of(result, 'cores')}, the browser on the same machine, medians of {len(result['runs'])} runs.",
    ]
    return "\n".join(lines)


def _frame_cpu() -> str:
    result = read_result("frame_cpu")
    before, after = result["medians"]["before"], result["medians"]["after"]
    lines = ["| core-milliseconds of a frame | before | after |", "|---|--:|--:|"]
    lines += [f"| {name} | {before[name]:.1f} | {after[name]:.1f} |" for name in before]
    what = f"nano, one expression, 720p, medians of {len(result['rounds']['after'])} rounds"
    commits = f"commits {result['base'][:7]} and {result['commit'][:7]}"
    return "\n".join([*lines, "", f"{what}, {machine_of(result, 'cores')}, {commits}."])


def _memory_cpu() -> str:
    result = read_result("memory_cpu")
    rows, growth = result["rows"], result["growth"]["host_mib_for_each_thousand_frames"]
    first, last = rows[min(9, len(rows) - 1)], rows[-1]
    return (
        f"Resident memory after {first['frames']} frames: {first['host_mib']:.0f} MiB; after {last['frames']}: "
        f"{last['host_mib']:.0f} MiB; by least squares {growth:+.2f} MiB for each thousand frames.\n\n"
        f"nano, two expressions, everything written, {machine_of(result, 'cores')}.\n\n"
        "![Resident memory over the frames](images/memory.svg)"
    )


def _loop_cpu() -> str:
    rows = read_rows("loop_cpu")
    lines = [
        "| | dtype | a frame (p20 to p80), s | frames/s | against the loop | encoder, s | decoder, s | rest, % |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        *(_loop_line(row) for row in rows),
    ]
    origin = rows[0]["provenance"]
    height, width = rows[0]["frame_size"]
    what = f"{origin['model']} at {origin['image_size']} pixels, {rows[0]['expressions']} expressions, {width} x {height}"
    machine = f"{rows[0]['rounds']} rounds, {machine_of(origin, 'threads')}, commit {origin['commit'][:7]}"
    return "\n".join([*lines, "", f"{what}, {machine}."])


def _loop_line(row: dict[str, Any]) -> str:
    name = f"| {row['provider']} | {row['dtype']} |"
    if "wrong" in row:
        return f"{name} wrong: {row['wrong']} | | | | | |"
    seconds, low, high = (1e-3 * row[key] for key in ("median_ms", "p20_ms", "p80_ms"))
    line = f"{name} {seconds:.2f} ({low:.2f} to {high:.2f}) | {1 / seconds:.3f} | {row['speedup']:.2f}x |"
    if "encoder_ms" not in row:
        return f"{line} | | |"
    parts = f"{1e-3 * row['encoder_ms']:.2f} | {1e-3 * row['decoder_ms']:.2f} | {row['overhead_percent']:.1f} |"
    return f"{line} {parts}"


def _expressions_cpu() -> str:
    rows = read_rows("expressions_cpu")
    lines = [
        "| encoder's products | expressions | a frame (p20 to p80), s | times one |",
        "|---|--:|--:|--:|",
    ]
    for row in rows:
        name = f"| {row['dtype']} | {row['expressions']} |"
        if "wrong" in row:
            lines.append(f"{name} wrong: {row['wrong']} | |")
            continue
        seconds, low, high = (1e-3 * row[key] for key in ("median_ms", "p20_ms", "p80_ms"))
        lines.append(f"{name} {seconds:.2f} ({low:.2f} to {high:.2f}) | {row['times_one']:.3f} |")
    origin = rows[0]["provenance"]
    what = f"{origin['model']} at {origin['image_size']} pixels, a 720p frame to masks of its size"
    return "\n".join(
        [*lines, "", f"{what}, {machine_of(origin, 'threads')}, commit {origin['commit'][:7]}."]
    )


def _bench_cpu() -> str:
    rows = read_rows("bench/cpu")
    lines = [
        "| | | median (p20 to p80), ms | against the first | of the limit | memory, MiB |",
        "|---|---|--:|--:|--:|--:|",
        *(_bench_line(row) for row in rows),
    ]
    origin = rows[0]["provenance"]
    return "\n".join(
        [*lines, "", f"{machine_of(origin, 'threads')}, commit {origin['commit'][:7]}."]
    )


def _bench_line(row: dict[str, Any]) -> str:
    ceiling = ", does less: a limit" if row.get("is_ceiling") else ""
    name = f"| {row['operator']}, {row['case']} | {row['provider']}{ceiling} |"
    for word in ("skipped", "wrong"):
        if word in row:
            return f"{name} {word}: {row[word]} | | | |"
    speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
    memory = row["peak_memory_bytes"]
    used = "" if memory is None else f"{memory / 2**20:.1f}"
    limits = [f"{row['percent_of_ceiling']:.0f} %"]
    if not ceiling:
        limits += [f"{share:.0f} % of {other}" for other, share in row["percent_of"].items()]
    times = f"{row['median_ms']:.2f} ({row['p20_ms']:.2f} to {row['p80_ms']:.2f})"
    return f"{name} {times} | {speedup} | {', '.join(limits)} | {used} |"


def _errors() -> str:
    """The messages that users meet, from docs/errors.yaml, by what they are about."""
    lines = []
    for group in yaml.safe_load((ROOT / "docs" / "errors.yaml").read_text(encoding="utf-8")):
        lines += [f"### {group['group']}", "", "| it says | because | do |", "|---|---|---|"]
        for error in group["errors"]:
            says = re.sub(r"\{[^}]*\}", "...", error["says"]).replace("|", "\\|")
            lines.append(f"| `{says}` | {error['why']} | {error['do']} |")
        lines.append("")
    return "\n".join(lines)


def _cuda_resources() -> str:
    result = read_result("cuda_resources")
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        name = row["kernel"].partition("<")[0]
        kernels.setdefault((row["source"], name), []).append(row)
    lines = [
        "| source | kernel | variants | registers | most bytes spilled |",
        "|---|---|--:|--:|--:|",
        *(_resources_line(*names, rows) for names, rows in kernels.items()),
    ]
    architectures = sorted({row["architecture"] for row in result["rows"]})
    targets = ", ".join(f"sm_{architecture}" for architecture in architectures)
    origin = result["provenance"]
    return "\n".join([*lines, "", f"{targets}; {origin['nvcc']}, commit {origin['commit'][:7]}."])


def _resources_line(source: str, kernel: str, rows: list[dict[str, Any]]) -> str:
    variants = len({row["kernel"] for row in rows})
    registers = [row["registers"] for row in rows]
    spilled = max(row["spill_bytes"] for row in rows)
    return f"| `{source}` | `{kernel}` | {variants} | {min(registers)} to {max(registers)} | {spilled} |"


def _training_cpu() -> str:
    result = read_result("training_cpu")
    baseline = result["rows"][0]
    lines = [
        "| a training step on | median (p20 to p80), s | steps/s | as fast | step, MiB | process, MiB | against the first |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(_training_line(row, baseline) for row in result["rows"]),
    ]
    what = f"{result['model']}, {result['image_size']} pixels, one clip of {result['frames']} frames, one sentence, float32"
    machine = machine_of(result, "threads")
    return "\n".join([*lines, "", f"{what}, {machine}, commit {result['commit'][:7]}."])


def _training_line(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    if "wrong" in row:
        return f"| {row['name']} | wrong: {row['wrong']} | | | | | |"
    seconds, low, high = (1e-3 * row[key] for key in ("median_ms", "p20_ms", "p80_ms"))
    step, process = row["step_memory_bytes"], row["process_memory_bytes"]
    memory = "| | |"
    if step is not None:
        share = 100 * process / baseline["process_memory_bytes"]
        own = 100 * step / baseline["step_memory_bytes"]
        memory = f"{step / 2**20:.0f} | {process / 2**20:.0f} | {own:.0f} % and {share:.0f} % |"
    return (
        f"| {row['name']} | {seconds:.2f} ({low:.2f} to {high:.2f}) | {row['steps_per_second']:.3f} | "
        f"{row['speedup']:.2f}x | {memory}"
    )


_TABLES = {
    "ui_cpu": _ui_cpu,
    "speed_cpu": speed_cpu,
    "evf_cpu": evf_cpu,
    "frame_cpu": _frame_cpu,
    "memory_cpu": _memory_cpu,
    "loop_cpu": _loop_cpu,
    "expressions_cpu": _expressions_cpu,
    "bench_cpu": _bench_cpu,
    "errors": _errors,
    "nano_generated": _nano_generated,
    "nano_real_clips": _nano_real_clips,
    "nano_davis": _nano_davis,
    "nano_photographs": _nano_photographs,
    "nano_composites": _nano_composites,
    "segment_nano_cpu": _segment_nano_cpu,
    "encoder_cpu": _encoder_cpu,
    "integrations_cpu": _integrations_cpu,
    "operators_cpu": _operators_cpu,
    "training_cpu": _training_cpu,
    "cuda_resources": _cuda_resources,
}


def main(arguments: list[str]) -> int:
    """Rewrites the pages; with --check only says which are out of date, and returns 1 if any is."""
    stale = []
    for page in PAGES:
        path = ROOT / page
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(page)
            if "--check" not in arguments:
                path.write_text(filled, encoding="utf-8")
    print(f"out of date: {', '.join(stale) or 'nothing'}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
