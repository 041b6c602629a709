"""The seconds of each stage of an evaluation, and a table of them."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from refsam.evaluation.reports.report import Table

# The stages in their order, and what each contains.
STAGES: Mapping[str, str] = {
    "decode": "read and decode the frame",
    "encode": "resize, normalise, image encoder; once per frame for all expressions",
    "prompt": "text encoder and projection; once per video and expression",
    "decode masks": "dense attention, mask decoder, tracking, masks at the frame's size",
    "write": "encode and write the PNGs",
}


class StageClock:
    """Adds up wall-clock seconds by stage; `synchronize` waits for the device at the end of a model's stage."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._synchronize = synchronize
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's time to the stage; the model's stages wait for the device."""
        started = time.perf_counter()
        try:
            yield
            if name in ("encode", "prompt", "decode masks"):
                self._synchronize()
        finally:
            with self._lock:
                self.seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds of every stage since the last call."""
        with self._lock:
            taken = {name: round(self.seconds[name], 6) for name in STAGES}
            self.seconds.clear()
        return taken


def speed_summary(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Frames, expressions' frames and seconds by stage, summed over the records of videos."""
    rows = list(records)
    seconds = {name: sum(row["seconds"][name] for row in rows) for name in STAGES}
    return {
        "frames": sum(row["frames"] for row in rows),
        "expression_frames": sum(row["frames"] * row["expressions"] for row in rows),
        "seconds": seconds,
        "total_seconds": sum(row["total_seconds"] for row in rows),
    }


def speed_table(summary: Mapping[str, Any]) -> Table:
    """Time and rate of every stage and in total, per frame and per mask."""
    rows = [_row(name, summary["seconds"][name], summary) for name in STAGES]
    rows.append(_row("all", summary["total_seconds"], summary))
    header = ("stage", "s", "ms/frame", "frames/s", "ms/mask", "masks/s")
    caption = (
        f"{summary['frames']} frames, {summary['expression_frames']} masks (frames times expressions). Wall clock, summed over "
        "processes, warm-up included; frames are decoded beside the rest."
    )
    return Table(header, tuple(rows), caption)


def _row(name: str, seconds: float, summary: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = []
    for count in (summary["frames"], summary["expression_frames"]):
        numbers.append(f"{1000 * seconds / count:.2f}" if count else "-")
        numbers.append(f"{count / seconds:.2f}" if seconds else "-")
    return (name, f"{seconds:.2f}", *numbers)
