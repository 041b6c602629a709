"""A run's folder: put in place at once, never by halves, never over what is somebody else's."""

import json
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from refsam.errors import UserError
from refsam.runtime.files import BusyError
from refsam.video import Frame, ResultWriter, run_folder
from refsam.video.run_folder import RunFolder, check_output, tidy
from tests.video.clips import picture

FPS = Fraction(25)


def open_writer(out: Path, texts: int = 1, **options: object) -> ResultWriter:
    options = {"fps": FPS, "time_base": 1 / FPS, "overlay": False} | options
    return ResultWriter(out, [f"thing {i}" for i in range(texts)], **options)  # type: ignore[arg-type]


def write(
    writer: ResultWriter, numbers: range | list[int], size: tuple[int, int] = (8, 12)
) -> None:
    for number in numbers:
        masks = np.ones((len(writer._expressions), *size), bool)
        writer.write(
            Frame(number, number / 25, picture(number, *size)), masks, np.zeros(len(masks))
        )


def run(out: Path, frames: int = 3, **options: object) -> Path:
    with open_writer(out, **options) as writer:  # type: ignore[arg-type]
        write(writer, range(frames))
        return writer.finish()


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


MASKS = [f"masks/00/{index:05d}.png" for index in range(3)]


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert files(run(tmp_path / "out")) == [*MASKS, "result.json"]


def test_second_run_into_one_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_writer(out) as first:
        write(first, range(3))
        with pytest.raises(BusyError, match="by another process"):
            open_writer(out, overwrite=True)
        first.finish()
    assert files(out) == [*MASKS, "result.json"]
    run(out, overwrite=True)  # the lock is gone with the run


LOCKING = """
import sys, time
from pathlib import Path
from refsam.video.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
(folder.new / "masks").mkdir()
print("locked", flush=True)
time.sleep(300)
"""


def test_lock_and_leftovers_of_a_killed_run_are_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", LOCKING, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"locked\n"
    with pytest.raises(BusyError):
        open_writer(out, overwrite=True)
    process.kill()
    process.communicate()
    assert list(out.glob(".refsam-unfinished-*"))
    assert files(run(out)) == [*MASKS, "result.json"]  # without --overwrite: there are no results


def test_overwriting_leaves_everything_that_no_run_recorded(tmp_path: Path) -> None:
    out = run(tmp_path / "data", frames=5, texts=2, overlay=True)
    mine = [
        "masks/gt/00000.png",
        "masks/00/notes.txt",
        "masks/readme.md",
        "clip.mp4",
        "masks/01/x.png",
    ]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    run(out, overwrite=True)
    assert files(out) == sorted([*MASKS, "result.json", *mine])


@pytest.mark.parametrize("name", ["masks/00/00001.png", "overlay.mp4", "result.json", "masks.json"])
def test_files_that_no_run_recorded_are_not_replaced(tmp_path: Path, name: str) -> None:
    out = tmp_path / "data"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(UserError, match="is not recorded as a result"):
        open_writer(out, overwrite=True)
    assert files(out) == [name] and (out / name).read_text() == "mine"


@pytest.mark.parametrize("source", ["out", "out/masks", "out/clip.mp4", "out/masks/*.png"])
def test_source_within_the_folder_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "out" / "masks").mkdir(parents=True)
    (tmp_path / "out" / "clip.mp4").write_text("a clip")
    with pytest.raises(UserError, match="lies in"):
        check_output(tmp_path / "out", overwrite=True, source=str(tmp_path / source))


# Finishing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_until_a_run_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    class Arrived(Exception):
        """The signal, once it is heeded."""

    def heed(*_: object) -> None:
        raise Arrived

    before = signal.signal(number, heed)
    commit = RunFolder.commit

    def interrupted(folder: RunFolder, *rest: object) -> None:
        os.kill(os.getpid(), number)
        commit(folder, *rest)  # type: ignore[arg-type]
        os.kill(os.getpid(), number)

    monkeypatch.setattr(RunFolder, "commit", interrupted)
    try:
        with pytest.raises(Arrived):
            run(tmp_path / "out")
    finally:
        signal.signal(number, before)
    assert files(tmp_path / "out") == [*MASKS, "result.json"]


class Killed(BaseException):
    """As if the process were no more: nothing is cleaned up."""


def test_kill_at_any_point_of_finishing_leaves_one_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later run finds the old results or the new ones, never parts of both."""
    steps = 0

    def counting(real):  # type: ignore[no-untyped-def]
        def step(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal steps
            steps += 1
            if steps == limit:
                raise Killed
            return real(*arguments, **options)

        return step

    seen = set()
    for limit in range(1, 40):
        out = run(tmp_path / str(limit), frames=5, texts=2)
        steps = 0
        with monkeypatch.context() as patch, open_writer(out, overwrite=True) as writer:
            write(writer, range(3))
            writer._stop()
            for owner, name in (
                (os, "replace"),
                (Path, "rename"),
                (Path, "unlink"),
                (Path, "rmdir"),
            ):
                patch.setattr(owner, name, counting(getattr(owner, name)))
            try:
                writer.finish()
                is_done = True
            except Killed:
                is_done = False
            writer._folder.is_open = False  # nobody is left to clean up
            writer._folder._held.close()
        tidy(out)
        found = json.loads((out / "result.json").read_text())["frames"]
        assert files(out) == sorted(
            [
                f"masks/{e:02d}/{i:05d}.png"
                for e in range(2 if found == 5 else 1)
                for i in range(found)
            ]
            + ["result.json"]
        )
        seen.add(found)
        if is_done:
            break
    assert seen == {3, 5} and limit > 10


# Names and sizes


def test_many_expressions_and_frames_sort(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out", 101) as writer:
        write(writer, [7, 99_999, 100_000], (2, 2))
        writer.finish()
    folders = sorted(path.name for path in (tmp_path / "out" / "masks").iterdir())
    assert folders == [f"{index:03d}" for index in range(101)]
    names = sorted(path.name for path in (tmp_path / "out" / "masks" / "000").iterdir())
    assert names == ["000007.png", "099999.png", "100000.png"]
    assert len(list(run_folder.recorded_files(tmp_path / "out"))) == 304


def test_overlay_of_frames_that_are_too_large_for_the_encoder(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out", overlay=True) as writer:
        write(writer, [0], (4, 17_000))
        writer.finish()
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as video:
        assert (video.streams.video[0].width, video.streams.video[0].height) == (16384, 4)
    assert Image.open(tmp_path / "out" / "masks" / "00" / "00000.png").size == (17_000, 4)


def test_overlay_keeps_the_shape_of_pixels_and_says_its_colours(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out", overlay=True) as writer:
        frame = Frame(0, 0.0, picture(0), Fraction(2))
        writer.write(frame, np.zeros((1, 48, 64), bool), np.zeros(1))
        writer.finish()
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as video:
        stream = video.streams.video[0]
        assert stream.sample_aspect_ratio == 2
        assert (stream.colorspace, stream.color_range) == (6, 1)


def with_sound(path: Path, codec: str) -> Path:
    """Two seconds: pictures, and a tone that is silent in the first half."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        audio = container.add_stream(codec, rate=48000, layout="mono")
        for index in range(50):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            container.mux(video.encode(frame))
            tone = np.sin(np.arange(1920) * 0.1) * 9000 * (index >= 25)
            sound = av.AudioFrame.from_ndarray(
                tone.astype(np.int16)[None], format="s16", layout="mono"
            )
            sound.rate, sound.pts = 48000, 1920 * index
            container.mux(audio.encode(sound))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "pcm_s16le")])
def test_overlay_keeps_the_sound(tmp_path: Path, name: str, codec: str) -> None:
    """From half a second on: the tone then begins after half a second."""
    source = with_sound(tmp_path / name, codec)
    with open_writer(tmp_path / "out", overlay=True, sound=(str(source), 0.0)) as writer:
        write(writer, range(12, 50), (48, 64))
        writer.finish()
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 38
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as video:
        heard = [(f.time, np.abs(f.to_ndarray()).max()) for f in video.decode(audio=0)]
    loud = [time for time, peak in heard if peak > 0.1]
    assert abs(loud[0] - 0.52) < 0.1 and 1.3 < heard[-1][0] < 1.6


def test_sound_that_cannot_be_kept_is_noted(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out", overlay=True, sound=("nowhere.mp4", 0.0)) as writer:
        write(writer, range(2), (48, 64))
        writer.finish()
    (note,) = json.loads((tmp_path / "out" / "result.json").read_text())["notes"]
    assert note.startswith("the sound could not be kept")
    assert not [thread for thread in threading.enumerate() if thread.name == "refsam-writer"]
