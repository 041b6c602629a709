"""``refsam segment``: the files it promises, and one line and exit code 2 for whatever is wrong."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from refsam import RefSAM, VideoSession
from refsam.cli import main
from refsam.video import open_source
from tests.tiny_model import tiny_model
from tests.video.clips import picture, write_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def segment(source: object, out: Path, *more: object, text: str = "the red cup") -> Result:
    return run("segment", source, "--text", text, "--out", out, "--device", "cpu", *more)


def says(result: Result, *parts: str) -> None:
    """One line on stderr with these parts, nothing else but progress, exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("segmenting:")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("refsam: ")
    assert "Traceback" not in result.output
    for part in parts:
        assert part in lines[0]


def test_writes_masks_overlay_and_report(checkpoint: Path, clip: Path, out: Path) -> None:
    result = segment(clip, out, "--checkpoint", checkpoint, "--text", "dog")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["masks", "overlay.mp4", "result.json"]
    report = json.loads((out / "result.json").read_text())
    assert report["model"] == str(checkpoint)
    assert report["source"] == str(clip)
    assert (report["frames"], report["fps"], report["complete"]) == (12, 25.0, True)
    assert [e["text"] for e in report["expressions"]] == ["the red cup", "dog"]
    assert report["timings"]["seconds_to_first_mask"] > 0
    session = VideoSession(RefSAM.from_pretrained(checkpoint), ["the red cup", "dog"])
    with open_source(clip) as source:
        for frame in source:
            expected = session.step(frame.image)
            for expression in range(2):
                path = out / "masks" / f"{expression:02d}" / f"{frame.index:05d}.png"
                mask = expected.masks[expression].numpy()
                assert (np.array(Image.open(path)) == 255 * mask).all()
                entry = report["expressions"][expression]
                assert entry["areas"][frame.index] == mask.sum()
                assert entry["scores"][frame.index] == pytest.approx(
                    float(expected.scores[expression]), abs=1e-4
                )
    with av.open(str(out / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12
        assert container.streams.video[0].average_rate == 25


def test_folder_of_images_and_single_image(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(picture(index, 21, 33)).save(folder / f"{index}.jpg")
    for source, count in ((folder, 3), (folder / "1.jpg", 1)):
        out = tmp_path / f"out{count}"
        result = segment(source, out, "--checkpoint", checkpoint, "--no-overlay")
        assert result.exit_code == 0, result.output
        masks = sorted((out / "masks" / "00").iterdir())
        assert len(masks) == count
        assert Image.open(masks[0]).size == (33, 21)
        assert not (out / "overlay.mp4").exists()


def test_overwrite(checkpoint: Path, clip: Path, out: Path) -> None:
    for _ in range(2):
        result = segment(clip, out, "--checkpoint", checkpoint, "--overwrite")
        assert result.exit_code == 0, result.output


def test_words_that_are_not_known_are_named(checkpoint: Path, clip: Path, out: Path) -> None:
    result = segment(clip, out, "--checkpoint", checkpoint, text="the red xqzzy")
    assert result.exit_code == 0
    assert "xqzzy" in result.stderr


def test_bfloat16(checkpoint: Path, clip: Path, out: Path) -> None:
    result = segment(clip, out, "--checkpoint", checkpoint, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "result.json").read_text())["dtype"] == "bfloat16"


# Errors before anything is written


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--device", "tpu"], ["--device tpu", "want auto, cpu, cuda or cuda:N"]),
        (["--device", "cuda:93"], ["--device cuda:93", "use --device cpu"]),
        (["--cuda-graphs"], ["--cuda-graphs", "the model is on cpu; want --device cuda"]),
        (["--dtype", "float8"], ["--dtype float8", "want auto, float32, bfloat16 or int8"]),
        (["--text", ""], ["--text is empty", "say what to segment"]),
        (["--text", " \t"], ["--text is empty"]),
        (["--text", "xqzzy wqrtl"], ["xqzzy", "wqrtl"]),
        (["--text", "red " * 600], ["600 words", "at most"]),
        (["--checkpoint", "no-such-model"], ["no-such-model"]),
        (["--surprise"], ["No such option: --surprise", "segment --help"]),
    ],
)
def test_wrong_options(
    checkpoint: Path, clip: Path, out: Path, arguments: list[str], parts: list[str]
) -> None:
    says(segment(clip, out, "--checkpoint", checkpoint, *arguments), *parts)
    assert not out.exists()


@pytest.mark.parametrize("missing", ["SOURCE", "--text", "--out"])
def test_missing_arguments(missing: str, clip: Path, out: Path) -> None:
    arguments = {"SOURCE": [clip], "--text": ["--text", "dog"], "--out": ["--out", out]}
    del arguments[missing]
    says(run("segment", *(word for words in arguments.values() for word in words)), missing)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"not a video\n" * 500, "cannot be read as a video"),
    ],
)
def test_wrong_sources(
    checkpoint: Path, tmp_path: Path, out: Path, content: bytes | None, part: str
) -> None:
    source = tmp_path / "clip.mp4"
    if content is not None:
        source.write_bytes(content)
    says(segment(source, out, "--checkpoint", checkpoint), str(source), part)
    assert not out.exists()


def test_truncated_video(checkpoint: Path, clip: Path, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "clip.mp4"
    source.write_bytes(clip.read_bytes()[:-400])
    says(segment(source, out, "--checkpoint", checkpoint), "give a complete video file")
    assert not out.exists()


def test_folder_without_images(checkpoint: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    says(segment(tmp_path / "empty", out, "--checkpoint", checkpoint), "holds no images")
    assert not out.exists()


@pytest.mark.parametrize("damage", ["pickle", "truncated", "foreign", "empty folder"])
def test_wrong_checkpoints(
    checkpoint: Path, clip: Path, tmp_path: Path, out: Path, damage: str
) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weights = (checkpoint / "model.safetensors").read_bytes()
    if damage != "empty folder":
        for file in checkpoint.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    if damage == "pickle":
        torch.save({"weight": Trap()}, folder / "model.safetensors")
    elif damage == "truncated":
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif damage == "foreign":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    says(segment(clip, out, "--checkpoint", folder), str(folder))
    assert not out.exists()
    assert not (tmp_path / "unpickled").exists()


def test_existing_output_is_untouched(checkpoint: Path, clip: Path, out: Path) -> None:
    out.mkdir()
    (out / "result.json").write_text("mine")
    says(segment(clip, out, "--checkpoint", checkpoint), "exists", "--overwrite")
    assert (out / "result.json").read_text() == "mine"
    assert len(list(out.iterdir())) == 1


def test_output_that_cannot_be_written(checkpoint: Path, clip: Path) -> None:
    says(
        segment(clip, Path("/proc/out"), "--checkpoint", checkpoint), "/proc/out cannot be written"
    )


def test_backend_that_cannot_run(
    checkpoint: Path, clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFSAM_BACKEND", "abacus")
    says(segment(clip, out, "--checkpoint", checkpoint), "abacus")
    assert not out.exists()


def test_debug_shows_the_traceback(out: Path) -> None:
    command = [sys.executable, "-m", "refsam", "segment", "nowhere.mp4", "--text", "dog"]
    shown = subprocess.run(
        [*command, "--out", str(out), "--debug"], capture_output=True, text=True, check=False
    )
    assert shown.returncode != 0
    assert "Traceback" in shown.stderr
    plain = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert plain.returncode == 2
    assert plain.stderr.count("\n") == 1


# Errors in the middle of the work


def test_damaged_frame_keeps_what_was_done(checkpoint: Path, tmp_path: Path, out: Path) -> None:
    source = write_video(tmp_path / "clip.mkv", frames=60)
    data = bytearray(source.read_bytes())
    for place in range(len(data) // 2, len(data) * 2 // 3, 7):
        data[place] ^= 255
    source.write_bytes(data)
    result = segment(source, out, "--checkpoint", checkpoint)
    report = json.loads((out / "result.json").read_text())
    frames = report["frames"]
    assert 10 < frames < 45
    says(
        result,
        f"frame {frames} of {source} cannot be decoded",
        f"the {frames} frames before",
        str(out),
    )
    assert report["complete"] is False
    assert f"frame {frames}" in report["stopped_by"]
    assert len(list((out / "masks" / "00").iterdir())) == frames
    with av.open(str(out / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == frames


def test_full_disk_leaves_nothing(
    checkpoint: Path, clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_bytes(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    says(segment(clip, out, "--checkpoint", checkpoint), "No space left on device")
    assert not out.exists()


def test_file_size_limit_stops_the_overlay(checkpoint: Path, tmp_path: Path, out: Path) -> None:
    noise = np.random.default_rng(0)
    (tmp_path / "frames").mkdir()
    for index in range(12):
        pixels = noise.integers(0, 256, (240, 320, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{index}.png")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        result = segment(tmp_path / "frames", out, "--checkpoint", checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    says(result, "cannot be written")
    assert not out.exists()


def test_interrupt_keeps_what_is_finished(checkpoint: Path, tmp_path: Path, out: Path) -> None:
    source = write_video(tmp_path / "clip.mp4", frames=200, options={"movflags": "faststart"})
    command = [sys.executable, "-m", "refsam", "segment", source, "--text", "dog", "--out", out]
    process = subprocess.Popen(
        # Nobody reads its lines until it is interrupted: it waits before it has done all frames, however fast it is.
        [*command, "--checkpoint", checkpoint, "--device", "cpu", "--json", "-"],
        pipesize=4096,  # some forty lines
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore interrupts, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while len(list(out.glob(".refsam-unfinished-*/new/masks/00/*.png"))) <= 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("refsam: interrupted; the ")
    report = json.loads((out / "result.json").read_text())
    assert report["complete"] is False
    assert report["stopped_by"] == "interrupted"
    assert 20 < report["frames"] < 200
    files = sorted((out / "masks" / "00").iterdir())
    assert [path.name for path in files] == [f"{i:05d}.png" for i in range(report["frames"])]
    for path in files:
        Image.open(path).load()
    with av.open(str(out / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == report["frames"]
    assert not list(out.glob(".refsam-unfinished*"))
