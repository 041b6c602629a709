"""`python -m benchmarks.end_to_end.expressions --out FILE`: the time of a frame with one expression and with eight, in one run.

Sessions of one model with random weights step through the same 720p frame in turn: preprocessing, image encoder, dense attention,
decoder, masks of the frame's own size. Expressions have up to eleven words. Before and after, the first expression must get the
same logits alone and among others. Each dtype of the image encoder's products is a group of its own.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import take_turns
from benchmarks.programs import add_sizes, make_parser, milliseconds, random_config, report_rows
from benchmarks.report.results import failure
from refsam import RefSAM, VideoSession
from refsam.runtime.malloc import keep_freed_memory

SIZE = (720, 1280)
# Relative to the largest logit: products are divided differently and so rounded differently; the decoder computes in float32.
TOLERANCE = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPRESSIONS = (
    "the large red ball on the left of the green square",
    "the small blue circle",
    "a yellow triangle with the big black ring",
    "the white square in the middle",
    "the green ball by the last black circle",
    "the dark object",
    "a small square on the right of the large red star",
    "the black triangle",
)
COUNTS = (1, len(EXPRESSIONS))


def make_model(name: str, image_size: int, depth: int | None) -> RefSAM:
    """A model with random weights and the small text encoder: expressions are encoded once for a video."""
    torch.manual_seed(0)
    return RefSAM(random_config(name, image_size, depth)).eval()


def run_group(model: RefSAM, frame: Tensor, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each number of expressions; with wrong results `wrong` in words and no times."""
    sessions = {count: VideoSession(model, EXPRESSIONS[:count]) for count in COUNTS}
    steps = {count: partial(session.step, frame) for count, session in sessions.items()}
    wrong = check(model, frame)
    for warm_up in steps.values():
        warm_up()
    times = take_turns(steps, repeats)
    wrong = wrong or check(model, frame)
    for count in COUNTS:
        row: dict[str, Any] = {"expressions": count}
        if wrong:
            yield row | {"wrong": wrong}
            continue
        ratio = times[count].median_ms / times[COUNTS[0]].median_ms
        yield row | asdict(times[count]) | {"times_one": ratio}


def check(model: RefSAM, frame: Tensor) -> str | None:
    """The error of the first expression's logits among others, in words, or None."""
    alone, among = (
        VideoSession(model, EXPRESSIONS[:count]).step(frame).logits[0] for count in COUNTS
    )
    error = float((alone - among).abs().max() / alone.abs().max())
    return None if error <= TOLERANCE else f"off by {error:.1e}, at most {TOLERANCE:.0e} may be"


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes one JSON line for each row; returns 1 if a result was wrong."""
    parser = make_parser(__file__, __doc__, "expressions_cpu.jsonl")
    add_sizes(parser)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    keep_freed_memory()  # as `refsam segment` does
    model = make_model(options.model, options.image_size, options.depth)
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(256, (*SIZE, 3), dtype=torch.uint8, generator=generator)
    rows = (
        {"dtype": dtype} | row
        for dtype in options.dtypes
        for row in run_group(model.deoptimize().optimize(DTYPES[dtype]), frame, options.repeats)
    )
    return report_rows(options, rows, table_line)


def table_line(row: dict[str, Any]) -> str:
    """One row as a line to print."""
    name = f"{row['dtype']:9} {row['expressions']} expressions"
    if problem := failure(row):
        return f"{name} {problem}"
    return f"{name} {milliseconds(row)} {row['times_one']:.3f} times one"


if __name__ == "__main__":
    sys.exit(main())
