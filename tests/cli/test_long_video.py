"""Three minutes of 720p take no more memory than ten seconds of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_model import tiny_model
from tests.video.clips import encode_video

CEILING = 900  # MiB in all: torch alone takes 250
GROWTH = 40  # MiB from ten seconds to three minutes, in which keeping 5100 masks would take 4500

MEASURED = (
    "import resource, sys; from refsam.cli import main\n"
    "try: main(sys.argv[1:])\n"
    "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
)


def write_noise(path: Path, seconds: int) -> Path:
    """720p at 30 frames/s: a drifting texture that is not free to encode."""
    texture = np.random.default_rng(0).integers(0, 256, (90, 160 + 64, 3), np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    starts = (index % 512 for index in range(30 * seconds))
    pictures = (np.ascontiguousarray(texture[:, start : start + 1280]) for start in starts)
    return encode_video(path, pictures, preset="ultrafast")


def peak_memory(source: Path, checkpoint: Path, out: Path) -> int:
    """MiB that a process needs at most to segment the source for two expressions."""
    texts = ["--text", "the red cup", "--text", "dog"]
    arguments = ["segment", source, *texts, "--out", out, "--checkpoint", checkpoint]
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments, "--device", "cpu"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout.split("peak")[-1])


@pytest.mark.slow
def test_memory_is_flat_over_three_minutes_of_720p(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    peaks = {}
    for seconds in (10, 180):
        source = write_noise(tmp_path / f"{seconds}.mp4", seconds)
        peaks[seconds] = peak_memory(source, tmp_path / "tiny", tmp_path / f"out{seconds}")
        report = json.loads((tmp_path / f"out{seconds}" / "result.json").read_text())
        assert report["frames"] == 30 * seconds
    print(peaks)
    assert peaks[180] < CEILING
    assert peaks[180] - peaks[10] < GROWTH
