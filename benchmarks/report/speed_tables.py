"""The tables of speed in README and docs/evf_sam.md."""

from benchmarks.report.results import machine_of, read_result, read_rows


def speed_cpu() -> str:
    """The README's four rows: the encoder in both dtypes, and a frame of several expressions."""
    encoders = {(row["name"], row["dtype"]): row for row in read_rows("integrations_cpu")}
    lines = [
        "| SAM ViT-B, 1024 pixels, two CPU cores | before, s | refsam, s | speed-up |",
        "|---|--:|--:|--:|",
    ]
    for dtype in ("float32", "bfloat16"):
        names = ("segment-anything", "segment-anything, optimize(), cpu")
        before, after = (1e-3 * encoders[name, dtype]["median_ms"] for name in names)
        lines.append(_speed_line(f"segment-anything's image encoder, {dtype}", before, after))
    loop, *ours = read_rows("loop_cpu")
    for row in ours:
        times = [1e-3 * each["median_ms"] for each in (loop, row)]
        what = (
            f"a frame of {row['expressions']} expressions against one pass for each, {row['dtype']}"
        )
        lines.append(_speed_line(what, *times))
    return "\n".join(lines)


def _speed_line(what: str, before: float, after: float) -> str:
    return f"| {what} | {before:.2f} | {after:.2f} | {before / after:.2f}x |"


def evf_cpu() -> str:
    result = read_result("evf_cpu")
    origin = result["provenance"]
    beit3 = result["beit3_1_s"]
    rows = [
        ("a frame, one expression, s", f"{result['frame_1_s']:.1f}"),
        ("a frame, four expressions, s", f"{result['frame_4_s']:.1f}"),
        ("the same by one whole pass per expression, s", f"{result['per_expression_4_s']:.1f}"),
        ("BEiT-3 for each expression and frame, ms", f"{1e3 * beit3:.0f}"),
        ("peak memory of the process, GiB", f"{result['peak_rss_bytes'] / 2**30:.1f}"),
    ]
    lines = ["| | measured |", "|---|--:|", *(f"| {what} | {got} |" for what, got in rows)]
    conditions = (
        f"ViT-H and BEiT-3 large, random weights, 1280 x 720, {result['dtype']}, "
        f"{machine_of(origin, 'threads')}, commit {origin['commit'][:7]}."
    )
    return "\n".join([*lines, "", conditions])
