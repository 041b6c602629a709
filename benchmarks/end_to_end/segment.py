"""`python -m benchmarks.end_to_end.segment --out FILE`: the command `refsam segment` from start to end, on a 720p clip.

The clip is generated, one expression is asked for, and everything is written: masks, overlay and result.json. Wall times, and
the processor time of a frame, which depends less on what else the machine does; medians of the runs.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.programs import make_parser, report_medians
from refsam.data.generated import generate_clip
from tests.video.clips import encode_video

RUNS = 3
FRAMES = 240
_SHORT = 24  # frames of a run that tells what starting costs
_DISTINCT = 24  # drawing is slow: the clip plays forwards and backwards


def write_clip(path: Path, frames: int = FRAMES) -> str:
    """Write a 720p clip at 30 frames/s; returns an expression about it."""
    clip = generate_clip(seed=0, frames=_DISTINCT, size=(720, 1280), kinds=("colour",))
    order = [*range(_DISTINCT), *reversed(range(_DISTINCT))]
    encode_video(path, (clip.frames[order[i % len(order)]].numpy() for i in range(frames)))
    return clip.expressions[0]


def run_once(clip: Path, expression: str, out: Path) -> dict[str, float]:
    """Seconds from the command to the first mask on disk, rates, and core-milliseconds of a frame without the start's."""
    command = [sys.executable, "-m", "refsam", "segment", str(clip), "--text", expression]
    short = [*command, "--max-frames", str(_SHORT), "--out", f"{out}-short"]
    before = _core_seconds()
    subprocess.run(short, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    between = _core_seconds()
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL)
    first = None
    while process.poll() is None:
        if first is None and any(out.rglob("*.png")):
            first = time.perf_counter() - started
        time.sleep(0.02)
    if process.returncode != 0 or first is None:
        raise RuntimeError(f"refsam segment ended with code {process.returncode}")
    ended = time.perf_counter()
    of_frames = (_core_seconds() - between) - (between - before)
    timings = json.loads((out / "result.json").read_text(encoding="utf-8"))["timings"]
    return {
        "first_mask_seconds": first,
        "frames_per_second": timings["frames_per_second"],
        "whole_command_frames_per_second": FRAMES / (ended - started),
        "core_milliseconds_per_frame": 1000 * of_frames / (FRAMES - _SHORT),
    }


def _core_seconds() -> float:
    """Processor time of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure, print and write."""
    arguments = make_parser(__file__, __doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        expression = write_clip(clip)
        runs = [run_once(clip, expression, Path(folder) / str(i)) for i in range(RUNS)]
    report_medians(arguments, runs, frames=FRAMES)


if __name__ == "__main__":
    main()
