"""One visitor's job: its masks are those of a session, whoever cancels keeps what is done."""

import json
import threading
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from refsam import FrameResult, VideoSession, load_model
from refsam.ui.jobs import Engine, Job, first_frame
from refsam.ui.uploads import Limits
from refsam.video import open_source
from tests.evf_folder import write_evf
from tests.tiny_model import tiny_model
from tests.video.clips import write_video

EXPRESSIONS = ["the red cup", "the dog"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("tiny", tiny_model(), torch.float32)


def make_job(engine: Engine, clip: Path, limits: Limits | None = None, **others: object) -> Job:
    turn = others.pop("turn", None) or threading.Lock()
    root = clip.parent
    return Job(engine, turn, clip, root, root / "job", EXPRESSIONS, limits or Limits())


def finish(job: Job) -> Job:
    job.start()
    for _ in job.updates():
        pass
    return job


def masks_in(path: Path) -> np.ndarray:
    """(E, T, H, W) bool."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        pictures = [np.asarray(Image.open(archive.open(name))) for name in names]
    masks = np.stack(pictures) == 255
    return masks.reshape(len(EXPRESSIONS), -1, *masks.shape[1:])


@pytest.mark.parametrize("kind", ["refsam", "evf"])
def test_downloads_hold_what_a_session_finds(kind: str, engine: Engine, tmp_path: Path) -> None:
    if kind == "evf":
        model = load_model(write_evf(tmp_path / "evf"))
        engine = Engine("evf", model, torch.float32)
    clip = write_video(tmp_path / "clip.mp4", frames=5)
    job = finish(make_job(engine, clip))
    assert job.error is None and job.stopped_by is None
    session = VideoSession(engine.model, EXPRESSIONS)
    with open_source(clip) as source:
        truth = np.stack([session.step(f.image).masks.numpy() for f in source], axis=1)
    assert truth.any() and not truth.all()
    assert np.array_equal(masks_in(job.downloads.masks), truth)
    result = json.loads(job.downloads.run_lengths.read_text())
    codes = [expression["segmentations"] for expression in result["expressions"]]
    assert np.array_equal([[coco.decode(code) == 1 for code in row] for row in codes], truth)
    assert [expression["text"] for expression in result["expressions"]] == EXPRESSIONS
    assert (result["complete"], result["frames"], result["source"]) == (True, 5, "clip.mp4")
    with av.open(str(job.downloads.overlay)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 5


def test_every_frame_can_be_looked_at(engine: Engine, tmp_path: Path) -> None:
    job = finish(make_job(engine, write_video(tmp_path / "clip.mp4", frames=3, size=(64, 1200))))
    (tmp_path / "frame.jpg").write_bytes(job.preview(2))
    with Image.open(tmp_path / "frame.jpg") as picture:
        assert picture.size == (960, 51)
    with pytest.raises(FileNotFoundError):
        job.preview(3)


def test_what_is_done_when_somebody_cancels_is_kept(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, step = threading.Event(), VideoSession.step

    def step_on(session: VideoSession, frame: object) -> FrameResult:
        assert session.frame_index < 2 or cancelled.wait(300)
        return step(session, frame)

    monkeypatch.setattr(VideoSession, "step", step_on)
    job = make_job(engine, write_video(tmp_path / "clip.mp4", frames=9))
    job.start()
    updates = job.updates()
    next(updates)
    job.cancel()
    cancelled.set()
    for _ in updates:
        pass
    assert job.stopped_by == "cancelled"
    done = masks_in(job.downloads.masks).shape[1]
    assert 1 <= done == job.progress.frames <= 3
    assert not json.loads(job.downloads.run_lengths.read_text())["complete"]


def test_a_job_that_waits_for_its_turn_can_be_cancelled(engine: Engine, tmp_path: Path) -> None:
    turn = threading.Lock()
    job = make_job(engine, write_video(tmp_path / "clip.mp4", frames=2), turn=turn)
    with turn:
        job.start()
        job.discard()
    assert not job.running and job.downloads is None and not (tmp_path / "job").exists()


def test_clips_that_do_not_say_their_length_end_at_the_limit(
    engine: Engine, tmp_path: Path
) -> None:
    """A raw stream announces nothing."""
    clip = write_video(tmp_path / "clip.h264", frames=9)
    job = finish(make_job(engine, clip, Limits(frames=4)))
    assert (job.progress.frames, job.stopped_by) == (4, "the limit of 4 frames")
    assert masks_in(job.downloads.masks).shape[1] == 4


def test_a_damaged_clip_gives_what_comes_before_the_damage(engine: Engine, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mkv", frames=60)
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 3 // 4])
    job = finish(make_job(engine, clip))
    assert job.error is None and "clip.mkv cannot be decoded" in job.stopped_by
    assert str(tmp_path) not in job.stopped_by
    assert 0 < masks_in(job.downloads.masks).shape[1] < 60


def test_expressions_that_the_model_cannot_take_are_named(engine: Engine, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=2)
    job = Job(engine, threading.Lock(), clip, tmp_path, tmp_path / "job", ["qwxz"], Limits())
    finish(job)
    assert "qwxz" in job.error and job.downloads is None


def test_the_first_frame_comes_with_words(tmp_path: Path) -> None:
    picture, words = first_frame(write_video(tmp_path / "clip.mp4"), tmp_path, Limits())
    assert picture[:2] == b"\xff\xd8" and words == "clip.mp4: 64 x 48, 12 frames"
