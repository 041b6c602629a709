"""Tables of segment-anything's own parts by `optimize()`: decoder, automatic masks, what noticing changed weights costs."""

import torch

from benchmarks.report.results import (
    machine_of,
    markdown,
    mebibytes,
    read_result,
    read_rows,
    spread,
    table,
)
from refsam_kernels.integrations.two_way_transformer import was_faster


@table
def decoder_cpu() -> str:
    """segment-anything's mask decoder as it is and by `optimize()`, with both ways of its attention to the pixels."""
    rows = read_rows("decoder_cpu")
    header = (
        "prompts | tokens of each | dtype | as it is, ms | attention as there | as `token_image_attention`"
        " | `optimize()` takes"
    )
    names = ("original_ms", "attention_as_there_ms", "attention_as_operator_ms")
    lines = []
    for row in sorted(rows, key=lambda row: (row["dtype"], row["prompts"], row["tokens"])):
        sizes = row["prompts"], row["tokens"]
        takes = names[2] if was_faster(getattr(torch, row["dtype"]), *sizes) else names[1]
        as_fast = f"{row[names[0]] / row[takes]:.2f}x"
        times = [f"{row[name]:.0f}" for name in names]
        way = "the operator" if takes == names[2] else "as there"
        lines.append([*map(str, sizes), row["dtype"], *times, f"{way}, {as_fast}"])
    origin = rows[-1]["provenance"]
    note = f"An image of 64 x 64 tokens, {machine_of(origin, 'threads')}."
    return markdown(header, lines, note)


@table
def mask_generator_cpu() -> str:
    """`SamAutomaticMaskGenerator` from the decoder's logits on."""
    rows = read_rows("mask_generator_cpu")
    lines = [
        [row["provider"], spread(row, 1e-3), mebibytes(row["peak_memory_bytes"])] for row in rows
    ]
    first = rows[0]
    height, width = first["frame"]
    what = f"{first['points']} points, {first['masks']} masks of {width} x {height} pixels, from logits to run lengths"
    what += f"; pixels that differ: {first['different_pixels']}"
    note = f"{what}, {machine_of(first['provenance'], 'threads')}."
    return markdown("| median (p20 to p80), s | memory, MiB", lines, note)


@table
def fingerprint_cpu() -> str:
    """Which share of a forward goes into noticing changed weights."""
    result = read_result("fingerprint_cpu")
    names = ("forward_ms", "fingerprint_ms", "share_percent")
    lines = [[row["model"], *(f"{row[name]:.2f}" for name in names)] for row in result["rows"]]
    header = "encoder | a forward, ms | noticing changed weights in it, ms | share, %"
    return markdown(header, lines, f"{machine_of(result, 'threads')}.")
