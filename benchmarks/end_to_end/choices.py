"""`python -m benchmarks.end_to_end.choices --out FILE`: what the choices in the path of a 720p frame rest on, on a CPU.

Settings of H.264 and ways to a mask's PNG: processor time of all threads, bytes and, for H.264, the error of luminance. Threads
for reading and for nano: processor time and time by the clock. All on frames of three generated clips with their masks drawn.
"""

import argparse
import io
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from benchmarks.provenance import collect
from refsam import RefSAM
from refsam.data.generated import generate_clip
from refsam.runtime.threads import available_cores
from refsam.video import draw_overlay
from refsam.video.writer import H264_OPTIONS, encode_mask

SIZE, CLIPS, DISTINCT, FRAMES = (720, 1280), 3, 12, 72
H264: dict[str, dict[str, object]] = {
    "veryfast, CRF 20": {"preset": "veryfast", "crf": "20"},
    "superfast, CRF 20": {"preset": "superfast", "crf": "20"},
    "ultrafast, CRF 22": {"preset": "ultrafast", "crf": "22"},
    "ultrafast, CRF 22, CABAC, deblocked (chosen)": H264_OPTIONS,
}


def measured(work: Callable[[int], Any], count: int) -> dict[str, float]:
    """Milliseconds of a core and by the clock for each of `count` calls, after one that warms up."""
    work(0)
    clock, core = time.perf_counter(), time.process_time()
    for index in range(count):
        work(index)
    core, clock = time.process_time() - core, time.perf_counter() - clock
    return {"core_ms": round(1000 * core / count, 2), "clock_ms": round(1000 * clock / count, 2)}


def h264(
    path: Path, pictures: list[av.VideoFrame], options: dict[str, object], frames: int, _: int
) -> None:
    """Write pictures, forwards and backwards, as `refsam segment` does with these options."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width = SIZE
        stream.pix_fmt, stream.options = "yuv420p", options
        for index in range(frames):
            picture = pictures[place(index, len(pictures))]
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def place(index: int, count: int) -> int:
    """Forwards, backwards and so on through `count` pictures."""
    return [*range(count), *range(count - 2, 0, -1)][index % (2 * count - 2)]


def signal_to_noise(path: Path, pictures: list[av.VideoFrame]) -> float:
    """Peak signal-to-noise ratio of luminance, in dB."""
    errors = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            found, true = (
                f.to_ndarray()[: SIZE[0]].astype(np.float32)
                for f in (frame, pictures[place(index, len(pictures))])
            )
            errors.append(float(((found - true) ** 2).mean()))
    return round(float(10 * np.log10(255**2 / np.mean(errors))), 2)


def h264_rows(pictures: list[av.VideoFrame], frames: int) -> Iterator[dict[str, Any]]:
    """Each setting of H.264."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for name, options in H264.items():
            cost = measured(partial(h264, path, pictures, options, frames), 1)
            each = {key: round(value / frames, 2) for key, value in cost.items()}
            size = round(path.stat().st_size / frames / 1000, 1)
            noise = signal_to_noise(path, pictures)
            yield {"part": "H.264", "choice": name, **each, "kilobytes": size, "psnr_db": noise}
        for kind in ("AUTO", "SLICE"):
            cost = measured(partial(read, path, kind), 1)
            each = {key: round(value / frames, 2) for key, value in cost.items()}
            yield {"part": "reading", "choice": f"threads {kind}", **each}


def read(path: Path, threads: str, _: int) -> None:
    """Decode a video to RGB."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = threads
        for frame in container.decode(video=0):
            frame.to_ndarray(format="rgb24")


def pillow(mask: np.ndarray, bits: int) -> bytes:
    """A mask as Pillow writes it, run lengths only."""
    buffer = io.BytesIO()
    image = Image.fromarray(-mask.view(np.uint8)) if bits == 8 else Image.fromarray(mask)
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def encode_one(way: Callable[[np.ndarray], bytes], masks: list[np.ndarray], index: int) -> None:
    """The mask with that index as a PNG."""
    way(masks[place(index, len(masks))])


def png_rows(masks: list[np.ndarray], frames: int) -> Iterator[dict[str, Any]]:
    """Each way to a PNG."""
    ways: dict[str, Callable[[np.ndarray], bytes]] = {
        "Pillow, 8 bits, run lengths": lambda mask: pillow(mask, 8),
        "Pillow, 1 bit, run lengths": lambda mask: pillow(mask, 1),
        "by hand, 8 bits, run lengths (chosen)": encode_mask,
    }
    for name, way in ways.items():
        cost = measured(partial(encode_one, way, masks), frames)
        size = round(float(np.mean([len(way(mask)) for mask in masks])) / 1000, 2)
        yield {"part": "PNG", "choice": name, **cost, "kilobytes": size}


def thread_rows(image: np.ndarray, expression: str, frames: int) -> Iterator[dict[str, Any]]:
    """The model with one thread and with one for each core."""
    model, before = RefSAM.from_pretrained("nano").eval().optimize(), torch.get_num_threads()
    with torch.no_grad():
        pixels, _ = model.preprocess(torch.from_numpy(image)[None])
        features, text = model.encode_image(pixels), model.encode_text([expression])
        token = model.decode(features, text).track_token
        works: dict[str, Callable[[int], Any]] = {
            "image encoder": lambda _: model.encode_image(pixels),
            "decoder": lambda _: model.decode(features, text, None, token),
        }
        for threads in sorted({1, available_cores()}):
            torch.set_num_threads(threads)
            for name, work in works.items():
                cost = measured(work, frames)
                yield {"part": name, "choice": f"torch with {threads} threads", **cost}
    torch.set_num_threads(before)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end.choices", description=__doc__
    )
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--distinct", type=int, default=DISTINCT)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    origin = collect("cpu")
    clips = [
        generate_clip(seed=seed, frames=arguments.distinct, size=SIZE, kinds=("colour",))
        for seed in range(CLIPS)
    ]
    images = [image for clip in clips for image in clip.frames.numpy()]
    masks = [mask for clip in clips for mask in clip.masks.numpy()[0]]
    drawn = [draw_overlay(i, m[None], ["a caption"]) for i, m in zip(images, masks, strict=True)]
    pictures = [
        av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
        for image in drawn
    ]
    rows = []
    for found in (
        h264_rows(pictures, arguments.frames),
        png_rows(masks, arguments.frames),
        thread_rows(images[0], clips[0].expressions[0], arguments.frames),
    ):
        for row in found:
            print(json.dumps(row), flush=True)
            rows.append(row)
    arguments.out.write_text(json.dumps({**origin, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
