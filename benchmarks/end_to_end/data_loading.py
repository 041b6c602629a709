"""Training clips of three 480p frames, from JPEG and palette PNG to a uint8 batch: their number per second.

`python -m benchmarks.end_to_end.data_loading --out FILE [--workers 2]` draws clips of Ref-YouTube-VOS's layout, 480 x 854, with
the default augmentation, and writes one JSON file: clips per second of so many processes, and processor seconds per clip of one.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.programs import make_parser, write_result
from refsam.config import config_from_dict
from refsam.data import open_dataset
from refsam.data.clips import ClipSampler
from refsam.data.generated import generate_clip
from refsam.training.batches import DatasetStream, batches
from refsam.training.settings import TrainingSettings
from tests.data.fixtures import write_json, write_numbers

SIZE = (480, 854)
FRAMES = 9
VIDEOS = 2


def write_videos(root: Path) -> int:
    """Generated clips in the layout of Ref-YouTube-VOS; returns the mean size of a JPEG in bytes."""
    videos = {}
    for seed in range(VIDEOS):
        clip = generate_clip(seed, frames=FRAMES, size=SIZE)
        names = [f"{5 * index:05d}" for index in range(FRAMES)]
        video = f"{seed:010x}"
        for time_index, name in enumerate(names):
            image = root / f"train/JPEGImages/{video}/{name}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(clip.frames[time_index].numpy()).save(image, quality=90)
            numbers = np.zeros(SIZE, np.uint8)
            for number, mask in enumerate(clip.masks[:, time_index].numpy(), start=1):
                numbers[mask] = number
            write_numbers(root / f"train/Annotations/{video}/{name}.png", numbers)
        expressions = {
            str(index): {"exp": text, "obj_id": str(index + 1)}
            for index, text in enumerate(clip.expressions)
        }
        videos[video] = {"expressions": expressions, "frames": names}
    write_json(root / "meta_expressions/train/meta_expressions.json", {"videos": videos})
    sizes = [path.stat().st_size for path in root.rglob("*.jpg")]
    return sum(sizes) // len(sizes)


def training_settings(root: Path, steps: int) -> TrainingSettings:
    """A run on those videos: one clip of three frames, one expression per step."""
    values = {
        "model": {"preset": "vit_b"},
        "output": "",
        "data": {"datasets": [{"name": "ref-youtube-vos", "root": str(root)}]},
        "stages": [{"steps": steps, "clips": 1, "frames": 3, "expressions": 1}],
    }
    return config_from_dict(TrainingSettings, values)


def clips_per_second(root: Path, workers: int, clips: int) -> float:
    """Clips that arrive per second from this many processes, once all of them run."""
    warm = 4 * workers
    dataset = open_dataset("ref-youtube-vos", root, "train")
    stream = DatasetStream(training_settings(root, clips + warm), [dataset])
    arriving: Iterator[object] = batches(stream, 0, clips + warm, workers)
    for _ in range(warm):
        next(arriving)
    begin = time.perf_counter()
    for _ in arriving:
        pass
    return clips / (time.perf_counter() - begin)


def seconds_per_clip(root: Path, clips: int) -> float:
    """Processor seconds of one clip in this process."""
    sampler = ClipSampler(open_dataset("ref-youtube-vos", root, "train"), frames=3)
    begin = time.process_time()
    for index in range(clips):
        sampler.clip(0, 0, index % len(sampler))
    return (time.process_time() - begin) / clips


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clips", type=int, default=400)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        content = {
            "cores": len(os.sched_getaffinity(0)),
            "workers": arguments.workers,
            "frame_size": SIZE,
            "frames_per_clip": 3,
            "mean_jpeg_bytes": write_videos(root),
            "cpu_seconds_per_clip": seconds_per_clip(root, arguments.clips // 4),
            "clips_per_second": clips_per_second(root, arguments.workers, arguments.clips),
        }
    print(
        f"{content['clips_per_second']:.1f} clips/s with {arguments.workers} processes, "
        f"{1e3 * content['cpu_seconds_per_clip']:.1f} ms of processor time per clip"
    )
    write_result(arguments, content)


if __name__ == "__main__":
    main()
