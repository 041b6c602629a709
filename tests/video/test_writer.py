"""Results read back exactly; unfinished ones leave nothing behind."""

import contextlib
import errno
import json
import os
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from refsam.errors import UserError
from refsam.video import Frame, ResultWriter
from refsam.video.writer import DiskFullError
from tests.video.clips import picture

FPS = Fraction(25)


def masks_of(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Two masks: noise, and one that is empty in every odd frame."""
    noise = np.random.default_rng(index).random((height, width)) < 0.3
    block = np.zeros((height, width), bool)
    block[5:20, 7:30] = index % 2 == 0
    return np.stack([noise, block])


def open_writer(out: Path, **options: object) -> ResultWriter:
    options = {"fps": FPS, "time_base": 1 / FPS} | options
    return ResultWriter(out, ["the noise", "the block"], **options)  # type: ignore[arg-type]


def write(writer: ResultWriter, frames: int, size: tuple[int, int] = (48, 64)) -> None:
    for index in range(frames):
        scores = np.array([0.25, 0.5 + 0.01 * index], np.float32)
        frame = Frame(index, float(index / FPS), picture(index, *size))
        writer.write(frame, masks_of(index, *size), scores)


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def remains(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_masks_overlay_and_report(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with open_writer(out) as writer:
        write(writer, 4)
        assert not (out / "masks").exists()
        writer.finish(model="tiny", complete=True)
    assert remains(out) == ["masks", "overlay.mp4", "result.json"]
    for expression in range(2):
        folder = out / "masks" / f"{expression:02d}"
        assert remains(folder) == [f"{index:05d}.png" for index in range(4)]
        for index in range(4):
            pixels = np.array(Image.open(folder / f"{index:05d}.png"))
            assert pixels.dtype == np.uint8
            assert (pixels == 255 * masks_of(index)[expression]).all()
    report = json.loads((out / "result.json").read_text())
    assert report["model"] == "tiny"
    assert report["frames"] == 4
    assert report["fps"] == 25
    block = report["expressions"][1]
    assert block["text"] == "the block"
    assert block["areas"] == [15 * 23, 0, 15 * 23, 0]
    assert np.allclose(block["scores"], [0.5, 0.51, 0.52, 0.53])


def test_overlay_is_h264_with_the_sources_rate_and_shows_the_masks(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out") as writer:
        write(writer, 10)
        writer.finish()
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 25
    frames = decoded(tmp_path / "out" / "overlay.mp4")
    assert [frame.time for frame in frames] == pytest.approx([index / 25 for index in range(10)])
    inside = frames[2].to_ndarray(format="rgb24")[12, 20].astype(int)
    assert np.abs(inside - picture(2)[12, 20]).sum() > 60


def test_overlay_keeps_variable_times(tmp_path: Path) -> None:
    times = [0, 0.04, 0.141, 0.18, 0.5, 1.777]
    with open_writer(tmp_path / "out", time_base=Fraction(1, 1000)) as writer:
        for index, time in enumerate(times):
            writer.write(Frame(index, time, picture(index)), masks_of(index), np.zeros(2))
        writer.finish()
    frames = decoded(tmp_path / "out" / "overlay.mp4")
    assert [frame.time for frame in frames] == pytest.approx(times, abs=0.001)


@pytest.mark.parametrize("size", [(47, 65), (1, 1), (2, 3)])
def test_odd_sizes_are_padded_in_the_overlay_only(tmp_path: Path, size: tuple[int, int]) -> None:
    with open_writer(tmp_path / "out") as writer:
        write(writer, 2, size)
        writer.finish()
    (first, _) = decoded(tmp_path / "out" / "overlay.mp4")
    assert (first.height, first.width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert Image.open(tmp_path / "out" / "masks" / "00" / "00000.png").size == size[::-1]


def test_frames_of_other_sizes_fit_into_the_first_ones_overlay(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out") as writer:
        for index, size in enumerate([(48, 64), (96, 96), (10, 200)]):
            frame = Frame(index, index / 25, picture(index, *size))
            writer.write(frame, np.zeros((2, *size), bool), np.zeros(2))
        writer.finish()
    frames = decoded(tmp_path / "out" / "overlay.mp4")
    assert {(frame.height, frame.width) for frame in frames} == {(48, 64)}
    assert Image.open(tmp_path / "out" / "masks" / "00" / "00002.png").size == (200, 10)


def test_no_overlay(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out", overlay=False) as writer:
        write(writer, 2)
        writer.finish()
    assert remains(tmp_path / "out") == ["masks", "result.json"]


def test_unfinished_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_writer(tmp_path / "deep" / "out") as writer:
        write(writer, 3)
        raise RuntimeError
    assert remains(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "refsam-writer"]


def test_existing_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out exists: give a new folder with --out, or --overwrite"):
        open_writer(tmp_path / "out")
    assert remains(tmp_path / "out") == ["notes.txt"]


def test_overwrite_replaces_results_only_and_only_when_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_writer(out) as writer:
        write(writer, 5)
        writer.finish(run=1)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError), open_writer(out, overwrite=True) as writer:
        write(writer, 1)
        raise RuntimeError
    assert json.loads((out / "result.json").read_text())["run"] == 1
    with open_writer(out, overwrite=True, overlay=False) as writer:
        write(writer, 2)
        writer.finish(run=2)
    assert remains(out) == ["masks", "notes.txt", "result.json"]
    assert json.loads((out / "result.json").read_text())["run"] == 2
    assert len(remains(out / "masks" / "00")) == 2


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="exists and is no folder"):
        open_writer(tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        open_writer(tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "a file"


def test_folder_that_cannot_be_written() -> None:
    with pytest.raises(UserError, match=r"^/proc/refsam-out cannot be written"):
        open_writer(Path("/proc/refsam-out"))


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, masks: int) -> None:
    """From that many masks on, none can be written; what gives space back makes room for other files."""
    really_write, written = Path.write_bytes, 0

    def write_bytes(path: Path, data: bytes) -> int:
        nonlocal written
        written += path.suffix == ".png"
        if path.suffix == ".png" and written > masks:
            really_write(path, data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return really_write(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_full_disk_before_the_first_frame_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk_after(monkeypatch, 1)
    with (
        pytest.raises(UserError, match=r"cannot be written \(No space left on device\): nothing"),
        open_writer(tmp_path / "out") as writer,
    ):
        write(writer, 5)
        writer.finish()
    assert remains(tmp_path) == []


@pytest.mark.parametrize("overlay", [True, False])
def test_full_disk_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: bool
) -> None:
    fill_disk_after(monkeypatch, 7)  # the fourth frame's second mask has no room
    out = tmp_path / "out"
    with open_writer(out, overlay=overlay) as writer:
        with contextlib.suppress(DiskFullError):
            write(writer, 9)
        with pytest.raises(DiskFullError, match="the 3 frames before are kept"):
            writer.finish(complete=True)
    report = json.loads((out / "result.json").read_text())
    assert (report["frames"], report["complete"]) == (3, False)
    assert "No space left" in report["stopped_by"]
    for expression in ("00", "01"):
        assert remains(out / "masks" / expression) == [f"{index:05d}.png" for index in range(3)]
    assert (out / "overlay.mp4").exists() == overlay
    assert not [name for name in remains(out) if name.startswith(".")]


def test_writing_waits_for_the_disk_instead_of_filling_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(ResultWriter, "_write_frame", lambda *_: gate.wait(300))
    with open_writer(tmp_path / "out", overlay=False) as writer:
        producer = threading.Thread(target=write, args=(writer, 40))
        producer.start()
        producer.join(0.3)
        assert producer.is_alive()
        gate.set()
        producer.join()
