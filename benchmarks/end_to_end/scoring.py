"""`python -m benchmarks.end_to_end.scoring --out FILE`: `refsam evaluate masks` with one process and with two, in turn.

Twice DAVIS 2017's validation set: 60 videos of 67 frames with two objects, as palette PNGs at 480p.
Every run must give the same scores. Each process has one thread: by default threads share a video's frames as well.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from refsam.evaluation.scoring.masks import evaluate_masks
from refsam.runtime.malloc import keep_freed_memory
from tests.data.fixtures import write_numbers

VIDEOS, FRAMES, OBJECTS = 60, 67, 2
SIZE, SIDE = (480, 854), 150
PROCESSES = (1, 2)


def write_videos(root: Path, videos: int, frames: int) -> tuple[Path, Path]:
    """Squares that move at random as predictions and as truth; returns both folders. All videos are links to one."""
    random = np.random.default_rng(0)
    folders = root / "predictions", root / "truth"
    for folder in folders:
        for time_index in range(frames):
            values = np.zeros(SIZE, np.uint8)
            for number in range(1, OBJECTS + 1):
                top, left = random.integers(0, 330), random.integers(0, 700)
                values[top : top + SIDE, left : left + SIDE] = number
            write_numbers(folder / "0" / f"{time_index:05d}.png", values)
        for video in range(1, videos):
            (folder / f"{video}").symlink_to(folder / "0")
    return folders


def measure(predictions: Path, truth: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every run by number of processes; raises RuntimeError where two runs differ in a score."""
    seconds: dict[str, list[float]] = {str(count): [] for count in PROCESSES}
    first: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for count in PROCESSES:
            started = time.perf_counter()
            scores = evaluate_masks(predictions, truth, processes=count).videos
            seconds[str(count)].append(time.perf_counter() - started)
            first = first or scores
            if scores != first:
                raise RuntimeError(f"{count} processes give other scores than the first run")
    return seconds


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    # Not at the top: the processes import this module, and torch, which scoring does not need, takes a second.
    from benchmarks.programs import make_parser, write_result

    os.environ["OMP_NUM_THREADS"] = "1"
    keep_freed_memory()  # as the command does
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=VIDEOS)
    parser.add_argument("--frames", type=int, default=FRAMES)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        folders = write_videos(Path(folder), options.videos, options.frames)
        seconds = measure(*folders, options.rounds)
    one, two = (statistics.median(seconds[str(count)]) for count in PROCESSES)
    content = {
        "cores": len(os.sched_getaffinity(0)),
        "videos": options.videos,
        "frames": options.videos * options.frames,
        "seconds": seconds,
        "speedup": one / two,
    }
    print(f"one process {one:.2f} s, two {two:.2f} s: {one / two:.2f} times as fast")
    write_result(options, content)


if __name__ == "__main__":
    main()
