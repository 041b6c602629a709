"""The tables of the bundled model: its model card's, and the speed of `refsam segment`."""

from benchmarks.report.results import machine_of, markdown, read_result, table


@table
def nano_generated() -> str:
    from refsam.evaluation.runners.generated import table as rows_of

    return rows_of(read_result("nano_generated")["summary"])


@table
def nano_real_clips() -> str:
    from benchmarks.end_to_end.real_clips import table as rows_of

    result = read_result("nano_real_clips")
    commits = f"Before: commit {result['base'][:7]}; now: {result['commit'][:7]}."
    return f"{rows_of(result['before'], result['now'])}\n\n{commits}"


@table
def nano_davis() -> str:
    from benchmarks.end_to_end.davis import table as rows_of

    return rows_of(read_result("nano_davis")["rows"])


@table
def nano_photographs() -> str:
    from benchmarks.end_to_end.photographs import table as rows_of

    return rows_of(read_result("nano_photographs")["summary"])


@table
def nano_composites() -> str:
    from benchmarks.end_to_end.composites import table as rows_of

    return rows_of(read_result("nano_composites"))


@table
def segment_nano_cpu() -> str:
    speed = read_result("segment_nano_cpu")
    names = {
        "frames_per_second": "`refsam segment`, 720p, frames/s",
        "first_mask_seconds": "first mask after the command, s",
        "core_milliseconds_per_frame": "processor time of a frame, all threads, ms",
    }
    medians = speed["medians"]
    rows = {name: medians[key] for key, name in names.items() if key in medians}
    conditions = f"{machine_of(speed, 'cores')}, one expression, default settings, medians of {len(speed['runs'])} runs."
    return markdown(" | measured", ((what, f"{got:.3g}") for what, got in rows.items()), conditions)
