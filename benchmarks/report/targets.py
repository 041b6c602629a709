"""What was asked of refsam's speed, memory and accuracy on a CPU, next to what the committed results say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]
Result = Callable[[str], Any]

SAM, SDPA = "segment-anything", "transformers, SDPA"


@dataclass(frozen=True)
class Target:
    """One figure: what it is, the bound asked for, and what was measured."""

    what: str
    asked: float
    measured: float
    at_most: bool = False

    @property
    def line(self) -> str:
        """A row of a Markdown table."""
        bound = f"{'at most ' if self.at_most else ''}{self.asked:g}"
        holds = self.measured <= self.asked if self.at_most else self.measured >= self.asked
        return f"| {self.what} | {bound} | {self.measured:.3g} | {'yes' if holds else '**no**'} |"


def table(result: Result, rows: Callable[[str], Rows]) -> str:
    """Every target as a Markdown table; `result` and `rows` read a committed file by its name."""
    targets = [
        # The second file is a later run in bfloat16, whose memory is the median of three processes: it replaces the first's.
        *_encoder(rows("encoder_cpu") + rows("encoder_bfloat16_cpu")),
        # A later run of what is compiled, and of nothing else.
        *_compiled_encoder(rows("encoder_latest_cpu")),
        *_integrations(rows("encoder_latest_cpu")),
        *_operators(rows("rel_pos_attention_cpu") + rows("masks_cpu")),
        *_frames(rows("expressions_cpu"), rows("loop_cpu")),
        *_nano(result("segment_nano_cpu"), result("nano_generated"), result("ui_cpu")),
        _real_clips(result("nano_real_clips")),
        *_training(result("training_cpu"), result("data_loading")),
        *_evaluation(result("metrics_cpu"), result("scoring")),
    ]
    lines = ["| on two cores | asked | measured | holds |", "|---|--:|--:|---|"]
    return "\n".join([*lines, *(target.line for target in targets)])


def _encoder(rows: Rows) -> list[Target]:
    found = {(row["name"], row["dtype"]): row for row in rows}
    ours = "refsam, fallback"

    def memory(dtype: str) -> float:
        baseline = found[SAM, dtype]["peak_memory_bytes"]
        return 100 * found[ours, dtype]["peak_memory_bytes"] / baseline

    return [
        Target("ViT-B encoder, `fallback`, float32, times segment-anything", 1.6, _times(found, ours, "float32")),
        Target("the same in bfloat16", 1.15, _times(found, ours, "bfloat16")),
        Target("the same in float32, times transformers", 1.3, _times(found, ours, "float32", SDPA)),
        Target("its memory above the weights, float32, % of segment-anything's", 30, memory("float32"), True),
        Target("the same in bfloat16", 30, memory("bfloat16"), True),
    ]  # fmt: skip


def _compiled_encoder(rows: Rows) -> list[Target]:
    found = {(row["name"], row["dtype"]): row for row in rows}
    ours = "refsam, cpu"
    return [
        Target("ViT-B encoder, compiled, float32, times segment-anything", 2.5, _times(found, ours, "float32")),
        Target("the same in bfloat16", 1.9, _times(found, ours, "bfloat16")),
    ]  # fmt: skip


def _times(
    found: dict[tuple[str, str], dict[str, Any]], name: str, dtype: str, baseline: str = SAM
) -> float:
    """How many times as fast as the baseline a provider was in the same run."""
    return found[baseline, dtype]["median_ms"] / found[name, dtype]["median_ms"]


def _integrations(rows: Rows) -> list[Target]:
    found = {(row["name"], row["dtype"]): row for row in rows}
    after = f"{SAM}, optimize(), cpu"
    before = found[SAM, "float32"]["peak_memory_bytes"]
    memory = 100 * found[after, "float32"]["peak_memory_bytes"] / before
    return [
        Target("`optimize(sam)`, float32, times segment-anything", 2.3, _times(found, after, "float32")),
        Target("the same in bfloat16", 1.6, _times(found, after, "bfloat16")),
        Target("the same in float32, times transformers", 1.5, _times(found, after, "float32", SDPA)),
        Target("its memory above the weights, % of segment-anything's", 30, memory, True),
    ]  # fmt: skip


def _operators(rows: Rows) -> list[Target]:
    found = {(row["operator"], row["case"], row["provider"]): row for row in rows}

    def times(operator: str, case: str, provider: str, baseline: str) -> float:
        return found[operator, case, baseline]["median_ms"] / found[operator, case, provider]["median_ms"]  # fmt: skip

    def attention(dtype: str) -> float:
        return times("rel_pos_attention_cpu", f"ViT-B global, {dtype}", "cpu", "sdpa, bias given")

    masks, large = "mask_postprocess", "8 masks to 1080p"
    batch = found[masks, large, "interpolate batch"]["peak_memory_bytes"]
    memory = 100 * found[masks, large, "cpu"]["peak_memory_bytes"] / batch
    loss = "4 masks at 480p, forward and backward"
    return [
        Target("`rel_pos_attention`, float32, times SDPA that has a bias", 1.0, attention("float32")),
        Target("the same in bfloat16", 1.5, attention("bfloat16")),
        Target("`mask_postprocess`, 8 to 1080p, times two batched resizes", 2, times(masks, large, "cpu", "interpolate batch")),
        Target("the same, times a loop over masks", 3, times(masks, large, "cpu", "interpolate loop")),
        Target("its memory, % of the batched resizes'", 25, memory, True),
        Target("`mask_loss` at 480p, times eager", 1.7, times("mask_loss", loss, "fallback", "eager")),
    ]  # fmt: skip


def _frames(expressions: Rows, loop: Rows) -> list[Target]:
    eight = {row["dtype"]: row["times_one"] for row in expressions if row["expressions"] == 8}
    ours = {row["dtype"]: row for row in loop if row["provider"] == "refsam segment"}
    return [
        Target("a frame with 8 expressions, times one with 1, float32", 1.1, eight["float32"], True),
        Target("the same in bfloat16", 1.1, eight["bfloat16"], True),
        Target("`refsam segment`, 4 expressions, float32, times the loop per expression", 8, ours["float32"]["speedup"]),
        Target("the same with the automatic dtype", 15, ours["auto"]["speedup"]),
        Target("time outside encoder and decoder, automatic dtype, %", 5, ours["auto"]["overhead_percent"], True),
    ]  # fmt: skip


def _nano(segment: Any, scores: Any, page: Any) -> list[Target]:
    summary, medians = scores["summary"], segment["medians"]
    times = page["medians"]
    return [
        Target("`nano`, `refsam segment` at 720p, frames/s", 25, medians["frames_per_second"]),
        Target("`nano`, J&F over everything on the frozen benchmark", 0.8, summary["accuracy"]["everything"]["J&F"]),
        Target("`nano`, falsely marked area of absent frames, %", 0.1, 100 * summary["false_area"], True),
        Target("`refsam ui`, first page, s", 8, times["first_page_seconds"], True),
        Target("`refsam ui`, first overlay of a 720p clip, s", 3, times["first_overlay_seconds"], True),
    ]  # fmt: skip


def _real_clips(clips: Any) -> Target:
    """What was asked is to be better than before: the bound is the mean that the earlier weights had."""
    from benchmarks.end_to_end.real_clips import mean

    before, now = (mean(clips[key], "J") for key in ("before", "now"))
    name = "`nano`, mean J on two real clips, against earlier weights"
    return Target(name, round(before, 3), now)


def _training(step: Any, loading: Any) -> list[Target]:
    rows = {row["name"]: row for row in step["rows"]}
    ours, baseline = rows["refsam"], rows["segment-anything, autograd through everything"]
    memory = 100 * ours["step_memory_bytes"] / baseline["step_memory_bytes"]
    return [
        Target("a training step, ViT-B at 512 pixels, times segment-anything's modules", 2, ours["speedup"]),
        Target("its memory, % of theirs", 40, memory, True),
        Target("clips of three 480p frames loaded in a second", 30, loading["clips_per_second"]),
    ]  # fmt: skip


def _evaluation(pairs: Any, scoring: Any) -> list[Target]:
    milliseconds = pairs["milliseconds_per_pair"]
    faster = milliseconds["davis"] / milliseconds["native"]
    return [
        Target("J and F of a 480p pair, times the DAVIS code", 10, faster),
        Target("scoring by two processes, times one", 1.8, scoring["speedup"]),
    ]
