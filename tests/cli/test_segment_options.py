"""Options of `refsam segment`: frames, formats, lines for programs, and resuming a run."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from typer.testing import CliRunner, Result

from refsam.cli import main
from refsam.video.mask_formats import davis_palette
from tests.tiny_model import tiny_model
from tests.video.clips import picture, write_video
from tests.video.test_writer import fill_disk_after


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture
def segment(checkpoint: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run the command on a source; the result and the output folder."""

    def run(source: object, *more: object, out: Path = tmp_path / "out") -> tuple[Result, Path]:
        words = ["segment", source, "--text", "dog", "--out", out, "--checkpoint", checkpoint]
        arguments = [str(word) for word in [*words, "--device", "cpu", *more]]
        return CliRunner().invoke(main, arguments), out

    return run


def report(out: Path) -> dict:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def masks_in(out: Path) -> np.ndarray:
    """(frames, H, W) bool of the first expression."""
    return np.stack([np.asarray(Image.open(f)) > 0 for f in sorted((out / "masks/00").iterdir())])


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--start", "0.08", "--end", "0.24"], [2, 3, 4, 5]),
        (["--stride", "5"], [0, 5, 10]),
        (["--max-frames", "2"], [0, 1]),
        (["--start", "0:0.2", "--stride", "3", "--max-frames", "2"], [5, 8]),
    ],
)
def test_choice_of_frames(segment, clip: Path, options: list[str], numbers: list[int]) -> None:  # type: ignore[no-untyped-def]
    result, out = segment(clip, *options)
    assert result.exit_code == 0, result.output
    assert report(out)["frame_numbers"] == numbers
    assert np.allclose(report(out)["times"], np.array(numbers) / 25)
    names = [file.name for file in sorted((out / "masks/00").iterdir())]
    assert names == [f"{number:05d}.png" for number in numbers]
    with av.open(str(out / "overlay.mp4")) as video:
        frames = list(video.decode(video=0))
        assert len(frames) == len(numbers) and frames[0].time == 0


def test_formats_hold_the_same_masks(segment, clip: Path) -> None:  # type: ignore[no-untyped-def]
    names = ("png", "palette", "rle", "cutout")
    result, out = segment(clip, "--text", "cup", *(w for n in names for w in ("--format", n)))
    assert result.exit_code == 0, result.output
    codes = json.loads((out / "masks.json").read_text())["expressions"]
    for index in range(12):
        masks = [
            np.asarray(Image.open(out / f"masks/{e:02d}/{index:05d}.png")) > 0 for e in range(2)
        ]
        palette = Image.open(out / f"palette/{index:05d}.png")
        assert palette.mode == "P" and bytes(palette.getpalette()[:9]) == davis_palette()[:9]
        expected = np.where(masks[1], 2, masks[0].astype(int))
        assert np.array_equal(np.asarray(palette), expected)
        for e, mask in enumerate(masks):
            assert np.array_equal(coco.decode(codes[e]["segmentations"][index]) == 1, mask)
            cutout = Image.open(out / f"cutouts/{e:02d}/{index:05d}.png")
            assert cutout.mode == "RGBA"
            assert np.array_equal(np.asarray(cutout)[..., 3] == 255, mask)
    assert davis_palette()[:12] == bytes([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])


def test_format_alone_leaves_the_others_out(segment, clip: Path) -> None:  # type: ignore[no-untyped-def]
    result, out = segment(clip, "--format", "palette", "--no-overlay")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["palette", "result.json"]


def test_threshold(segment, clip: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    areas = []
    for index, threshold in enumerate((0.05, 0.5, 0.95)):
        _, out = segment(clip, "--threshold", threshold, out=tmp_path / str(index))
        areas.append(masks_in(out))
    assert (areas[2] <= areas[1]).all() and (areas[1] <= areas[0]).all()
    assert areas[2].sum() < areas[0].sum()


def test_lines_for_programs(segment, clip: Path) -> None:  # type: ignore[no-untyped-def]
    result, out = segment(clip, "--json", "-", "--format", "rle")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["frame"] for line in lines] == list(range(12))
    assert "12 frames in" in result.stderr
    found = report(out)["expressions"][0]
    for line, score, area in zip(lines, found["scores"], found["areas"], strict=True):
        (entry,) = line["expressions"]
        assert (entry["text"], entry["score"], entry["area"]) == ("dog", score, area)
        assert coco.decode(entry["segmentation"]).sum() == area
        assert (entry["box"] is None) == (area == 0)


def test_quiet(segment, clip: Path) -> None:  # type: ignore[no-untyped-def]
    result, _ = segment(clip, "--quiet", "--text", "the red xqzzy")
    assert (result.exit_code, result.output) == (0, "")


def test_files_of_a_folder_are_named_and_bad_ones_skipped(segment, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(picture(index)).save(folder / f"f{index}.jfif", "JPEG")
    (folder / "f1.jfif").write_bytes(b"no image")
    (folder / "f2b.png").symlink_to(folder / "nowhere.png")
    result, out = segment(folder, "--skip-bad-frames")
    assert result.exit_code == 0, result.output
    found = report(out)
    assert found["files"] == ["f0.jfif", "f1.jfif", "f2.jfif", "f2b.png", "f3.jfif"]
    assert found["frame_numbers"] == [0, 2, 4]
    assert [entry["frame"] for entry in found["skipped_frames"]] == [1, 3]
    assert found["complete"]


@pytest.mark.parametrize("pattern", ["*.jpg", "f%02d.jpg", "f?[0-9].jpg"])
def test_patterns(segment, tmp_path: Path, pattern: str) -> None:  # type: ignore[no-untyped-def]
    for index in (2, 10, 1):
        Image.fromarray(picture(index)).save(tmp_path / f"f{index:02d}.jpg")
    result, out = segment(tmp_path / pattern)
    assert result.exit_code == 0, result.output
    assert report(out)["files"] == ["f01.jpg", "f02.jpg", "f10.jpg"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--start", "x"], "--start x: want seconds"),
        (["--start", "2", "--end", "1"], "--end 1: want a time behind --start 2"),
        (["--format", "tiff"], "--format tiff: want png, palette, rle or cutout"),
        (["--threshold", "1"], "--threshold 1: want a number between 0 and 1"),
        (["--start", "99"], "has no frame in the chosen range"),
        (["--text", "d\udcffg"], "is not UTF-8"),
    ],
)
def test_wrong_choices(segment, clip: Path, options: list[str], part: str) -> None:  # type: ignore[no-untyped-def]
    result, out = segment(clip, *options)
    assert result.exit_code == 2
    assert part in result.stderr and "Traceback" not in result.output
    assert not out.exists()


def test_empty_source(segment) -> None:  # type: ignore[no-untyped-def]
    result, out = segment("")
    assert result.exit_code == 2 and "the source is empty" in result.stderr
    assert not out.exists()


def test_empty_folder_and_colons_are_fine(
    segment,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("http:clip.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "out").mkdir()
    result, out = segment("http:clip.mp4")
    assert result.exit_code == 0, result.output
    assert report(out)["frames"] == 12


def test_names_that_are_not_utf8(segment, clip: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    name = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / name).write_bytes(clip.read_bytes())
    result, out = segment(tmp_path / name)
    assert result.exit_code == 0, result.output
    assert report(out)["source"] == str(tmp_path / name)


# Going on


def test_resumed_run_equals_one_in_one_go(
    segment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    from refsam.session import VideoSession

    source = write_video(tmp_path / "clip.mp4", frames=20)
    formats = ["--format", "png", "--format", "rle"]
    _, whole = segment(source, *formats, out=tmp_path / "whole")
    step, steps = VideoSession.step, 0

    def interrupted(session: VideoSession, frame: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return step(session, frame)  # type: ignore[arg-type]

    monkeypatch.setattr(VideoSession, "step", interrupted)
    result, out = segment(source, *formats)
    assert result.exit_code == 130, result.output
    assert (report(out)["frames"], report(out)["complete"]) == (7, False)
    monkeypatch.undo()
    result, _ = segment(source, *formats, "--threshold", "0.6", "--resume")
    assert result.exit_code == 2 and "threshold was 0.5, now 0.6" in result.stderr
    result, _ = segment(source, *formats, "--resume")
    assert result.exit_code == 0, result.output
    assert (masks_in(out) == masks_in(whole)).all()
    for key in ("frames", "times", "frame_numbers", "expressions", "complete"):
        assert report(out)[key] == report(whole)[key]
    codes = [json.loads((folder / "masks.json").read_text()) for folder in (out, whole)]
    assert codes[0]["expressions"] == codes[1]["expressions"]
    with av.open(str(out / "overlay.mp4")) as video:
        shown = list(video.decode(video=0))
    with av.open(str(whole / "overlay.mp4")) as video:
        for one, other in zip(shown, video.decode(video=0), strict=True):
            difference = one.to_ndarray(format="rgb24").astype(int) - other.to_ndarray(
                format="rgb24"
            )
            assert np.abs(difference).mean() < 6
    times = [frame.time for frame in shown]
    assert times == pytest.approx([index / 25 for index in range(20)])
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    result, _ = segment(source, *formats, "--resume")
    assert result.exit_code == 0 and "done before" in result.stdout


# Signals and silence


def start(
    checkpoint: Path, source: object, out: Path, *more: str, **options: object
) -> subprocess.Popen:
    command = [sys.executable, "-m", "refsam", "segment", str(source), "--text", "dog"]
    command += ["--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu", *more]

    def defaults() -> None:  # a shell's background jobs and nohup ignore some of them
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=defaults,
        **options,
    )


def wait_for_masks(process: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(list(out.glob(".refsam-unfinished-*/new/masks/00/*.png"))) < count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_termination_keeps_what_is_finished(checkpoint: Path, tmp_path: Path) -> None:
    number = signal.SIGHUP  # SIGTERM is the same to the command: test_interrupts.py
    source = write_video(tmp_path / "clip.mp4", frames=200)
    # Nobody reads its lines until it is told to end: it waits before it has done all frames, however fast it is.
    process = start(checkpoint, source, tmp_path / "out", "--json", "-", pipesize=4096)
    wait_for_masks(process, tmp_path / "out", 5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert f"ended by {number.name}" in stderr.splitlines()[-1]
    found = report(tmp_path / "out")
    assert found["frames"] >= 5 and not found["complete"]
    assert not list((tmp_path / "out").glob(".refsam-unfinished*"))


def test_interrupt_while_a_pipe_is_silent(checkpoint: Path, tmp_path: Path) -> None:
    options = {"movflags": "frag_every_frame+empty_moov"}
    content = write_video(tmp_path / "clip.mp4", frames=40, options=options).read_bytes()
    read, write = os.pipe()
    os.write(write, content[: len(content) * 3 // 4])
    process = start(checkpoint, "-", tmp_path / "out", "--timeout", "3600", stdin=read)
    wait_for_masks(process, tmp_path / "out", 3)
    time.sleep(0.5)  # by then it usually waits for more; nothing depends on it
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    os.close(write)
    assert process.returncode == 130, stderr
    assert report(tmp_path / "out")["frames"] >= 3


def test_silent_pipe_is_given_up(segment, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    os.mkfifo(tmp_path / "pipe")
    result, out = segment(tmp_path / "pipe", "--timeout", "0.3")
    assert result.exit_code == 2 and "sent nothing for 0.3 s" in result.stderr
    assert not out.exists()


def test_a_run_that_a_full_disk_ended_is_resumed(
    segment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    source = write_video(tmp_path / "clip.mp4", frames=12)
    _, whole = segment(source, out=tmp_path / "whole")
    fill_disk_after(monkeypatch, 5)
    result, out = segment(source)
    assert result.exit_code == 2 and "the 5 frames before are kept" in result.stderr
    assert (report(out)["frames"], report(out)["complete"]) == (5, False)
    monkeypatch.undo()
    result, _ = segment(source, "--resume")
    assert result.exit_code == 0, result.output
    assert report(out)["complete"] and (masks_in(out) == masks_in(whole)).all()


def test_pixels_that_are_not_square_keep_the_stored_size(segment, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = write_video(tmp_path / "clip.mp4", frames=2, aspect=Fraction(2))
    result, out = segment(source)
    assert result.exit_code == 0, result.output
    assert masks_in(out).shape == (2, 48, 64)
    with av.open(str(out / "overlay.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.height, stream.width, stream.sample_aspect_ratio) == (48, 64, 2)
