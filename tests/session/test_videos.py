"""Many videos: what one by one gives, shared, continued after a kill, and not stopped by one that is broken."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refsam import RefSAM, VideoSession
from refsam.errors import UserError
from refsam.session import Shard, VideoOutcome, segment_videos
from refsam.video import Frame, ResultWriter, open_source
from tests.tiny_model import tiny_model
from tests.video.clips import picture, write_video

TEXTS = ["the red cup", "dog"]


@pytest.fixture(scope="module")
def model() -> RefSAM:
    return tiny_model()


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Three videos of different sizes and lengths, and a folder of images."""
    paths = [
        write_video(tmp_path / "a.mp4", frames=9),
        write_video(tmp_path / "b.mkv", "ffv1", frames=4, size=(33, 47), pixel_format="bgr0"),
        write_video(tmp_path / "c.mp4", frames=6, size=(64, 48)),
        tmp_path / "d",
    ]
    paths[3].mkdir()
    for index in range(3):
        Image.fromarray(picture(index, 21, 33)).save(paths[3] / f"{index}.png")
    return paths


def masks_in(folder: Path) -> np.ndarray:
    """(E, frames, H, W) bool."""
    expressions = sorted((folder / "masks").iterdir())
    return np.stack(
        [
            np.stack([np.asarray(Image.open(file)) > 0 for file in sorted(expression.iterdir())])
            for expression in expressions
        ]
    )


def assert_as_alone(model: RefSAM, video: Path, folder: Path, texts: list[str] = TEXTS) -> None:
    session = VideoSession(model, texts)
    with open_source(video) as source:
        expected = np.stack([session.step(f.image).masks.numpy() for f in source], axis=1)
    assert (masks_in(folder) == expected).all()
    report = json.loads((folder / "result.json").read_text())
    assert (report["frames"], report["complete"]) == (expected.shape[1], True)
    assert report["source"] == str(video)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equal_to_one_by_one(
    model: RefSAM, videos: list[Path], tmp_path: Path, batch_size: int
) -> None:
    out = tmp_path / "out"
    outcomes = segment_videos(model, videos, TEXTS, out, batch_size=batch_size)
    assert {(o.folder.name, o.frames, o.problem) for o in outcomes} == {
        ("a", 9, None),
        ("b", 4, None),
        ("c", 6, None),
        ("d", 3, None),
    }
    for video in videos:
        assert_as_alone(model, video, out / video.stem)
        assert (out / video.stem / "overlay.mp4").is_file()


def test_each_video_may_have_expressions_of_its_own(
    model: RefSAM, videos: list[Path], tmp_path: Path
) -> None:
    texts = [["dog"], ["tree", "dog"], ["the red cup"], ["cat"]]
    segment_videos(model, videos, texts, tmp_path / "out", batch_size=4, overlay=False)
    for video, own in zip(videos, texts, strict=True):
        assert_as_alone(model, video, tmp_path / "out" / video.stem, own)
        assert not (tmp_path / "out" / video.stem / "overlay.mp4").exists()


def test_videos_of_one_name(model: RefSAM, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    paths = [write_video(tmp_path / name / "clip.mp4", frames=2) for name in ("x", "y")]
    outcomes = segment_videos(model, paths, TEXTS, tmp_path / "out")
    assert sorted(outcome.folder.name for outcome in outcomes) == ["clip", "clip-2"]


def test_names_are_unique_and_stay(model: RefSAM, tmp_path: Path) -> None:
    """`a-2` is taken, endings differ, folders have dots in their names, and a later run has more videos in another order."""
    names = ("a.mkv", "a.mp4", "a-2.mp4", "A.mov", "v1.0", "v1.1")
    paths = []
    for name in names:
        path = tmp_path / name
        if "." in name[-4:-2]:
            write_video(path, frames=1)
        else:
            path.mkdir()
            Image.fromarray(picture(0)).save(path / "0.png")
        paths.append(path)
    out = tmp_path / "out"
    first = segment_videos(model, paths[1:4], TEXTS, out, overlay=False)
    folders = {outcome.source: outcome.folder for outcome in first}
    outcomes = segment_videos(model, paths, TEXTS, out, overlay=False)
    assert len({outcome.folder.name.casefold() for outcome in outcomes}) == len(paths)
    assert all(outcome.problem is None for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.was_done == (outcome.source in folders)
        assert folders.get(outcome.source, outcome.folder) == outcome.folder
        assert json.loads((outcome.folder / "result.json").read_text())["source"] == outcome.source
    known = json.loads((out / "videos.json").read_text())["videos"]
    assert {entry["source"]: entry["folder"] for entry in known} == {
        outcome.source: outcome.folder.name for outcome in outcomes
    }
    assert {o.folder.name for o in outcomes} >= {"v1.0", "v1.1"}


def test_what_another_process_is_doing_is_left_to_it(
    model: RefSAM, videos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with ResultWriter(out / "a", TEXTS, fps=Fraction(25), time_base=Fraction(1, 25)) as other:
        outcomes = segment_videos(model, videos[:2], TEXTS, out)
        assert {o.folder.name: o.is_busy for o in outcomes} == {"a": True, "b": False}
        assert list((out / "a").glob(".refsam-unfinished-*"))
        other.write(Frame(0, 0.0, picture(0)), np.zeros((2, 48, 64), bool), np.zeros(2))
        other.finish()
    assert json.loads((out / "a" / "result.json").read_text())["frames"] == 1


def test_a_source_is_never_overwritten(model: RefSAM, videos: list[Path], tmp_path: Path) -> None:
    """The results of the folder `d` would come into it."""
    (outcome,) = segment_videos(model, [videos[3]], TEXTS, tmp_path)
    assert "lies in" in (outcome.problem or "")
    assert sorted(path.name for path in videos[3].iterdir()) == ["0.png", "1.png", "2.png"]


def test_done_videos_are_skipped(model: RefSAM, videos: list[Path], tmp_path: Path) -> None:
    out, seen = tmp_path / "out", list[VideoOutcome]()
    segment_videos(model, videos[:2], TEXTS, out)
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    (out / "a" / ".refsam-unfinished-1" / "new").mkdir(parents=True)  # killed in the last moment
    outcomes = segment_videos(model, videos, TEXTS, out, advance=seen.append)
    assert {o.folder.name: o.was_done for o in outcomes} == {n: n in "ab" for n in "abcd"}
    assert seen == outcomes
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert not list(out.rglob(".refsam*"))


def test_other_settings_are_refused(model: RefSAM, videos: list[Path], tmp_path: Path) -> None:
    segment_videos(model, videos[:1], TEXTS, tmp_path / "out", settings={"model": "tiny"})
    for texts, settings, part in (
        (["cat"], {"model": "tiny"}, r"text was \['the red cup', 'dog'\], now \['cat'\]"),
        (TEXTS, {"model": "huge"}, "model was 'tiny', now 'huge'"),
    ):
        with pytest.raises(UserError, match=part):
            segment_videos(model, videos, texts, tmp_path / "out", settings=settings)
    (tmp_path / "out" / "a" / "result.json").write_text("[]")
    with pytest.raises(UserError, match="is no result of refsam"):
        segment_videos(model, videos, TEXTS, tmp_path / "out")


def test_shares_make_a_whole(model: RefSAM, videos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shares = [
        segment_videos(model, videos, TEXTS, out, shard=Shard(rank, 3), overlay=False)
        for rank in range(3)
    ]
    names = [outcome.folder.name for share in shares for outcome in share]
    assert sorted(names) == ["a", "b", "c", "d"]
    assert all(shares)
    again = segment_videos(model, videos, TEXTS, out, overlay=False)  # by one process
    assert all(outcome.was_done for outcome in again)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_broken_does_not_stop_the_others(
    model: RefSAM, videos: list[Path], tmp_path: Path, batch_size: int
) -> None:
    (tmp_path / "words.mp4").write_text("no video\n" * 400)
    (videos[3] / "2.png").write_bytes((videos[3] / "2.png").read_bytes()[:60])
    given = [tmp_path / "missing.mp4", *videos, tmp_path / "words.mp4"]
    out = tmp_path / "out"
    outcomes = segment_videos(model, given, TEXTS, out, batch_size=batch_size)
    found = {o.folder.name: (o.frames, o.problem or "") for o in outcomes}
    assert {name: frames for name, (frames, _) in found.items()} == {
        "missing": 0,
        "a": 9,
        "b": 4,
        "c": 6,
        "d": 2,
        "words": 0,
    }
    assert "does not exist" in found["missing"][1]
    assert "cannot be read as a video" in found["words"][1]
    assert "frame 2" in found["d"][1]
    assert not (out / "missing").exists() and not (out / "words").exists()
    report = json.loads((out / "d" / "result.json").read_text())
    assert (report["complete"], report["frames"]) == (False, 2)
    for video in videos[:3]:
        assert_as_alone(model, video, out / video.stem)
    Image.fromarray(picture(2, 21, 33)).save(videos[3] / "2.png")  # repaired: it is done anew
    segment_videos(model, videos, TEXTS, out, batch_size=batch_size)
    assert_as_alone(model, videos[3], out / "d")


# Stays with the long video, once another one is done.
KILLED = """
import sys, time
from refsam.session import segment_videos
from refsam.video import ResultWriter
from tests.tiny_model import tiny_model
write = ResultWriter.write
def stay(writer, frame, *others):
    if (writer.out.parent / "short" / "result.json").exists() and writer.out.name == "long":
        print("stays", flush=True)
        time.sleep(600)
    write(writer, frame, *others)
ResultWriter.write = stay
segment_videos(tiny_model(), sys.argv[2:], ["the red cup", "dog"], sys.argv[1], batch_size=2)
"""


def test_killed_run_goes_on(model: RefSAM, tmp_path: Path) -> None:
    lengths = {"short": 3, "other": 4, "long": 40}
    videos = [write_video(tmp_path / f"{n}.mp4", frames=count) for n, count in lengths.items()]
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out), *map(str, videos)]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "stays\n"
        process.kill()
    assert (out / "long").exists() and not (out / "long" / "result.json").exists()
    outcomes = segment_videos(model, videos, TEXTS, out)
    assert "short" in {o.folder.name for o in outcomes if o.was_done}
    for video in videos:
        assert_as_alone(model, video, out / video.stem)
    assert not list(out.rglob(".refsam*"))


def test_bad_arguments(model: RefSAM, videos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for texts, batch_size, part in (
        ("dog", 1, "expressions: got 'dog', want a list of strings"),
        ([["dog"], ["cat"]], 1, "expressions: got 2 lists, want 4"),
        (TEXTS, 0, "batch_size: got 0, want at least 1"),
    ):
        with pytest.raises(ValueError, match=part):
            segment_videos(model, videos, texts, out, batch_size=batch_size)
    with pytest.raises(UserError, match="xqzzy"):
        segment_videos(model, videos, [["dog"], ["xqzzy"], ["cat"], ["dog"]], out)
    assert not out.exists()
    out.write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written|is no folder"):
        segment_videos(model, videos, TEXTS, out)
