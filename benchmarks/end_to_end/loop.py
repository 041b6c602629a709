"""`python -m benchmarks.end_to_end.loop --out FILE`: `refsam segment` against one encoder pass per expression.

The command reads a 720p clip and writes masks, overlay and result.json, all of which is timed; once its products are float32,
once its dtype is automatic. The loop over segment-anything's modules (`per_expression`) computes masks of the frame's
size in float32, and reads and writes nothing. Both have the same random weights, adapters included, and take turns. Text is
encoded before the clocks start. No time is reported for a command whose masks are not the loop's, in any of its runs.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.end_to_end.expressions import EXPRESSIONS, make_model
from benchmarks.end_to_end.per_expression import PerExpressionLoop
from benchmarks.measure import summarise, time_cpu
from benchmarks.programs import add_sizes, in_new_process, make_parser, milliseconds, report_rows
from benchmarks.report.results import failure
from refsam import RefSAM
from refsam.data.generated import generate_clip
from refsam.video import open_source, read_image
from tests.sam_modeling import randomise
from tests.video.clips import encode_video

SIZE = (720, 1280)
LOOP, OURS = "per-expression loop", "refsam segment"
DTYPES = ("float32", "auto")  # the command's --dtype
CHECKED_FRAMES = 2  # the second one has track tokens
# Relative to the largest logit, in float32; with automatic dtypes twice the error of bfloat16 inside the loop itself.
TOLERANCE = 1e-4

Interval = tuple[float, float]


@dataclass(frozen=True)
class Truth:
    """The loop's logits (P, H, W) of the first frames, and how large others' errors may be by dtype, relative to the largest."""

    logits: list[Tensor]
    limits: dict[str, float]

    def wrong(self, out: Path, dtype: str) -> str | None:
        """The error of the masks that the command wrote, in words: they may differ at the threshold only."""
        for frame, logits in enumerate(self.logits):
            found = written_masks(out, frame, len(logits))
            decided = self.decided(logits, dtype)
            different = int(((found != (logits > 0)) & decided).sum())
            if different:
                return f"{different} decided pixels of frame {frame} differ, none may"
        return None

    def decided(self, logits: Tensor, dtype: str) -> Tensor:
        """Pixels whose logits are further from the threshold than their allowed error."""
        return logits.abs() > self.limits[dtype] * logits.abs().max()

    def decided_share(self, dtype: str) -> float:
        """Share of all masks that is checked."""
        return float(torch.stack([self.decided(x, dtype).float() for x in self.logits]).mean())


@dataclass(frozen=True)
class Task:
    """One run of the command."""

    clip: str
    expressions: Sequence[str]
    checkpoint: str
    dtype: str
    out: str


def written_masks(out: Path, frame: int, count: int) -> Tensor:
    """The masks (P, H, W) bool of a frame, read from the files."""
    paths = (out / "masks" / f"{index:02d}" / f"{frame:05d}.png" for index in range(count))
    return torch.from_numpy(np.stack([read_image(path)[..., 0] > 127 for path in paths]))


def run_segment(task: Task) -> dict[str, float]:
    """`segment_once` in a process of its own, whose threads wait as the command's do."""
    with mock.patch.dict(os.environ, OMP_WAIT_POLICY="PASSIVE"):
        return in_new_process(segment_once, task)


def segment_once(task: Task) -> dict[str, float]:
    """Runs the command in this process: seconds in the encoder, the decoder, either, and from the first frame to the end."""
    from refsam.cli import main

    calls: dict[str, list[Interval]] = {"encoder": [], "decoder": []}

    def timed(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = method(*arguments, **options)
            calls[stage].append((begin, time.perf_counter()))
            return result

        return run

    with (
        mock.patch.object(RefSAM, "encode_image", timed("encoder", RefSAM.encode_image)),
        mock.patch.object(RefSAM, "decode", timed("decoder", RefSAM.decode)),
    ):
        options = ["--checkpoint", task.checkpoint, "--device", "cpu", "--dtype", task.dtype]
        texts = [word for text in task.expressions for word in ("--text", text)]
        try:
            main(["segment", task.clip, *texts, "--out", task.out, *options])
        except SystemExit as end_of_command:
            if end_of_command.code:
                raise
    end, both = time.perf_counter(), calls["encoder"] + calls["decoder"]
    seconds = {stage: covered(intervals) for stage, intervals in calls.items()}
    return seconds | {"either": covered(both), "all": end - min(both)[0]}


def covered(intervals: list[Interval]) -> float:
    """Seconds in which at least one of the intervals runs: the encoder may work beside the decoder."""
    seconds, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return seconds


def find_truth(model: RefSAM, frames: list[Tensor], expressions: Sequence[str]) -> Truth:
    """The loop's logits of these frames, and on the first one what bfloat16 in its encoder changes."""
    prompts = [model.encode_text([text]) for text in expressions]
    loop = PerExpressionLoop(model)
    logits = [loop.step(frame, prompts)[0] for frame in frames]
    rounded, _ = PerExpressionLoop(model, torch.bfloat16).step(frames[0], prompts)
    error = float((rounded - logits[0]).abs().max() / logits[0].abs().max())
    return Truth(logits, {"float32": TOLERANCE, "auto": max(2 * error, TOLERANCE)})


def measure(
    model: RefSAM,
    clip: Path,
    expressions: Sequence[str],
    rounds: int,
    run: Callable[[Task], dict[str, float]] = run_segment,
) -> Iterator[dict[str, Any]]:
    """A row for the loop and one for each dtype of the command; one with wrong masks has `wrong` and no times."""
    with open_source(str(clip)) as source:
        frames = [torch.from_numpy(frame.image) for frame in source]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(Path(folder) / "model")
        truth = find_truth(model, frames[:CHECKED_FRAMES], expressions)
        loop, prompts = PerExpressionLoop(model), [model.encode_text([t]) for t in expressions]
        loop_samples: list[float] = []
        samples: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in DTYPES}
        wrong: dict[str, str | None] = dict.fromkeys(DTYPES)
        for number in range(rounds):
            frame = frames[number % len(frames)]
            loop_samples.append(time_cpu(partial(loop.step, frame, prompts)))
            for dtype in DTYPES:
                out = Path(folder) / f"{dtype}-{number}"
                task = Task(str(clip), expressions, f"{folder}/model", dtype, str(out))
                samples[dtype].append({k: v / len(frames) for k, v in run(task).items()})
                wrong[dtype] = wrong[dtype] or truth.wrong(out, dtype)
    baseline = summarise(loop_samples)
    common = {"expressions": len(expressions), "frame_size": list(frames[0].shape[:2])}
    yield common | {"provider": LOOP, "dtype": "float32", "speedup": 1.0} | asdict(baseline)
    for dtype in DTYPES:
        row = common | {"provider": OURS, "dtype": dtype}
        row |= {"limit": truth.limits[dtype], "decided_share": truth.decided_share(dtype)}
        if wrong[dtype]:
            yield row | {"wrong": wrong[dtype]}
        else:
            yield row | times_of(samples[dtype], baseline.median_ms)


def times_of(samples: list[dict[str, float]], baseline_ms: float) -> dict[str, Any]:
    """Times of a frame, of its parts, and what share of it is neither encoder nor decoder."""
    times = {name: summarise([sample[name] for sample in samples]) for name in samples[0]}
    overhead = [1 - sample["either"] / sample["all"] for sample in samples]
    return asdict(times["all"]) | {
        "speedup": baseline_ms / times["all"].median_ms,
        "encoder_ms": times["encoder"].median_ms,
        "decoder_ms": times["decoder"].median_ms,
        "overhead_percent": 100 * sorted(overhead)[len(overhead) // 2],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes one JSON line for each row; returns 1 if masks were wrong."""
    parser = make_parser(__file__, __doc__, "loop_cpu.jsonl")
    add_sizes(parser)
    parser.add_argument("--expressions", type=int, default=4)
    parser.add_argument("--frames", type=int, default=6, help="of the clip")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    model: Any = randomise(make_model(options.model, options.image_size, options.depth))
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        encode_video(clip, generate_clip(seed=0, frames=options.frames, size=SIZE).frames.numpy())
        rows = measure(model, clip, EXPRESSIONS[: options.expressions], options.rounds)
        return report_rows(options, rows, table_line)


def table_line(row: dict[str, Any]) -> str:
    """One row as a line to print."""
    name = f"{row['provider']:20} {row['dtype']:8}"
    if problem := failure(row):
        return f"{name} {problem}"
    line = f"{name} {milliseconds(row)} a frame {row['speedup']:6.2f}x"
    if "overhead_percent" not in row:
        return line
    return f"{line}  encoder {row['encoder_ms']:.0f} ms, decoder {row['decoder_ms']:.0f} ms, rest {row['overhead_percent']:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
