"""`python -m benchmarks.end_to_end.memory --out FILE.json --plot FILE.svg`: memory of `refsam segment`'s path over 10,000 frames.

A clip is read, segmented by nano for two expressions and written, overlay too, with threads, weights and freed memory as the
command has them. Of every 100 frames the largest resident memory is noted, and on a GPU the memory that torch has allocated
there. Small frames keep it short: memory does not depend on what they show.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.measure import resident
from benchmarks.programs import make_parser, write_result
from benchmarks.provenance import collect
from refsam import RefSAM, VideoSession
from refsam.runtime.malloc import keep_freed_memory
from refsam.runtime.threads import choose_threads
from refsam.session import prefetch_frames
from refsam.video import ResultWriter, open_source
from tests.video.clips import encode_video

FRAMES, EVERY, SETTLED = 10_000, 100, 1000
SIZE = (180, 320)
EXPRESSIONS = ("the red circle", "the blue square")
RATE = Fraction(30)


def pictures(frames: int) -> Iterator[np.ndarray]:
    """A red and a blue block that cross a drifting texture."""
    height, width = SIZE
    texture = np.random.default_rng(0).integers(0, 160, (height // 4, width // 2, 3), np.uint8)
    texture = texture.repeat(4, axis=0).repeat(4, axis=1)
    for index in range(frames):
        image = texture[:, index % width :][:, :width].copy()
        left = 2 * index % (width - 60)
        image[30:90, left : left + 60] = (230, 30, 30)
        image[100:150, width - left - 50 : width - left] = (30, 30, 230)
        yield image


def run(model: RefSAM, frames: int, folder: Path) -> list[dict[str, float]]:
    """Segment the clip as the command does; one row for every EVERY frames."""
    clip = folder / "clip.mp4"
    encode_video(clip, pictures(frames), preset="ultrafast")
    session = VideoSession(model.optimize(), EXPRESSIONS)
    rows, most = [], 0
    with open_source(clip) as source:
        writer = ResultWriter(folder / "out", EXPRESSIONS, fps=RATE, time_base=1 / RATE)
        with writer, closing(prefetch_frames(session, source)) as pairs:
            for frame, prepared in pairs:
                writer.write(frame, *session.step(prepared).on_host())
                most = max(most, resident("VmRSS"))
                if (frame.index + 1) % EVERY == 0:
                    rows.append(row(frame.index + 1, most, model.device.type))
                    print(rows[-1], flush=True)
                    most = 0
            writer.finish()
    return rows


def row(frames: int, most: int, device: str) -> dict[str, float]:
    """Memory after this many frames, in MiB: the largest resident memory since the last row, and the device's memory."""
    found = {"frames": frames, "host_mib": round(most / 2**20, 2)}
    if device == "cuda":
        found["device_mib"] = round(torch.cuda.memory_allocated() / 2**20, 2)
    return found


def growth(rows: list[dict[str, float]], key: str) -> float:
    """MiB for each thousand frames by least squares, from SETTLED frames on."""
    settled = [r for r in rows if r["frames"] >= SETTLED] or rows
    frames, memory = ([r[name] for r in settled] for name in ("frames", key))
    return round(1000 * float(np.polyfit(frames, memory, 1)[0]), 4)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Memory over frames; the axis begins at zero."""
    figure = Figure(figsize=(7, 3), layout="tight")
    axes = figure.add_subplot()
    for key, label in (("host_mib", "resident"), ("device_mib", "on the device")):
        if key in rows[0]:
            axes.plot([r["frames"] for r in rows], [r[key] for r in rows], label=label)
    axes.set(xlabel="frames", ylabel="memory, MiB", ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with rc_context({"svg.hashsalt": "refsam"}):  # the same rows give the same file
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print, write and draw."""
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--plot", type=Path, required=True)
    arguments = parser.parse_args()
    keep_freed_memory()
    model = RefSAM.from_pretrained("nano").to(arguments.device).eval()
    choose_threads(model.device, model.config.image_encoder.multiplications)
    arguments.origin = collect(arguments.device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(model, arguments.frames, Path(folder))
    keys = [key for key in rows[0] if key != "frames"]
    summary = {f"{key}_for_each_thousand_frames": growth(rows, key) for key in keys}
    print(summary, f"in {time.perf_counter() - started:.0f} s")
    write_result(arguments, {"frame_size": SIZE, "growth": summary, "rows": rows})
    plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
