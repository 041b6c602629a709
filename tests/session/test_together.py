"""Sessions that step together see what they see alone."""

import threading
from collections.abc import Iterator
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch

from refsam import RefSAM, VideoSession
from refsam.session import (
    EncodedFrame,
    FramePreparer,
    FrameResult,
    PreparedFrame,
    prefetch_frames,
    preparation,
    step_batch,
    streaming,
)
from refsam.session.video_session import image_features
from refsam.video import Frame, FrameDecodeError
from refsam.video.prefetch import Prefetched
from tests.session import cuda_stand_in
from tests.tiny_model import tiny_model, tiny_trunk_model

VIDEOS = {  # expressions, and the frames' size
    0: (["the red cup", "dog"], (45, 70)),
    1: (["the person on the left of the green car"], (64, 64)),
    2: (["dog", "tree", "a big box"], (30, 90)),
}


@pytest.fixture(scope="module", params=["square", "none"])
def model(request: pytest.FixtureRequest) -> RefSAM:
    """Padded to squares, or rectangles of several shapes and a trunk beside the encoder."""
    return tiny_model() if request.param == "square" else tiny_trunk_model()


def video(index: int, frames: int = 4) -> list[np.ndarray]:
    noise = np.random.default_rng(index)
    return [noise.integers(0, 256, (*VIDEOS[index][1], 3), np.uint8) for _ in range(frames)]


def alone(model: RefSAM, index: int) -> list[FrameResult]:
    session = VideoSession(model, VIDEOS[index][0])
    return [session.step(frame) for frame in video(index)]


def assert_same(found: FrameResult, expected: FrameResult) -> None:
    assert found.frame_index == expected.frame_index
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)
    assert found.masks.shape == expected.masks.shape
    # Masks may differ where a logit is 0 within the tolerance only: nowhere in these.
    assert torch.equal(found.masks, expected.masks)


def test_a_frame_of_each_video(model: RefSAM) -> None:
    sessions = {index: VideoSession(model, texts) for index, (texts, _) in VIDEOS.items()}
    expected = {index: alone(model, index) for index in VIDEOS}
    for time in range(4):
        turns = [(sessions[index], video(index)[time]) for index in VIDEOS]
        for index, result in zip(VIDEOS, step_batch(turns), strict=True):
            assert_same(result, expected[index][time])


def test_videos_that_begin_at_different_times(model: RefSAM) -> None:
    first, second = (VideoSession(model, VIDEOS[index][0]) for index in (0, 2))
    first.step(video(0)[0])
    results = step_batch([(first, video(0)[1]), (second, video(2)[0])])
    assert_same(results[0], alone(model, 0)[1])
    assert_same(results[1], alone(model, 2)[0])


def test_several_frames_of_a_video(model: RefSAM) -> None:
    first, second = (VideoSession(model, VIDEOS[index][0]) for index in (0, 1))
    frames = video(0), video(1)
    turns = [(first, f) for f in frames[0][:3]] + [(second, frames[1][0]), (first, frames[0][3])]
    results = step_batch(turns)
    for time, result in zip((0, 1, 2, 3), [*results[:3], results[4]], strict=True):
        assert_same(result, alone(model, 0)[time])
    assert_same(results[3], alone(model, 1)[0])


def test_one_without_expressions_among_others(model: RefSAM) -> None:
    empty, other = VideoSession(model), VideoSession(model, VIDEOS[0][0])
    results = step_batch([(empty, video(1)[0]), (other, video(0)[0])])
    assert results[0].masks.shape == (0, 64, 64)
    assert_same(results[1], alone(model, 0)[0])
    assert step_batch([]) == []


def test_encoded_frames_equal_plain_ones(model: RefSAM) -> None:
    sessions = [VideoSession(model, VIDEOS[index][0]) for index in (0, 2)]
    encoded = [
        EncodedFrame(model.encode_image(ready.pixels), ready.size, 0.0)
        for ready in (FramePreparer(model)(video(index)[0]) for index in (0, 2))
    ]
    results = step_batch(list(zip(sessions, encoded, strict=True)))
    for index, result in zip((0, 2), results, strict=True):
        assert_same(result, alone(model, index)[0])
    with pytest.raises(ValueError, match="turns: got encoded frames among others"):
        step_batch([(sessions[0], encoded[0]), (sessions[1], video(2)[1])])


@pytest.mark.parametrize("threads", [1, 2])
def test_read_ahead_with_and_without_the_encoder(
    model: RefSAM, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("refsam.session.streaming.available_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    session = VideoSession(model, VIDEOS[0][0])
    frames = [Frame(time, float(time), image) for time, image in enumerate(video(0))]
    for kind, encode in ((EncodedFrame, True), (PreparedFrame, False)):
        session.reset()
        ahead = prefetch_frames(session, frames, encode=encode)
        for expected, (frame, ready) in zip(alone(model, 0), ahead, strict=True):
            assert isinstance(ready, kind if threads == 1 else PreparedFrame)
            assert frame.index == expected.frame_index
            assert_same(session.step(ready), expected)


@pytest.mark.parametrize(("source", "together"), [("file", 4), ("live", 1), ("large", 1)])
def test_frames_are_encoded_together_as_far_as_they_are_there(
    model: RefSAM, monkeypatch: pytest.MonkeyPatch, source: str, together: int
) -> None:
    """A live source gives a frame only when the masks of the one before are known: waiting for it would last for ever."""
    monkeypatch.setattr(streaming, "_has_a_core_for_the_encoder", lambda model: True)
    if source == "large":
        monkeypatch.setattr(streaming, "_BYTES_TOGETHER", 1)
    sizes: list[int] = []

    def counted(runner: Any, frames: list[PreparedFrame]) -> Any:
        sizes.append(len(frames))
        return image_features(runner, frames)

    monkeypatch.setattr(streaming, "image_features", counted)
    done = threading.Semaphore(1 if source == "live" else 99)
    images = [*video(0), *video(1)] * 3  # of two sizes
    read_whole = threading.Event()

    def frames() -> Iterator[Frame]:
        for number, image in enumerate(images):
            assert done.acquire(timeout=300)
            yield Frame(number, float(number), image)
        read_whole.set()
        raise FrameDecodeError("broken")

    def wait_until_full(ahead: Prefetched[Any]) -> Any:
        """Hand out a frame of a file only when as many wait as may: the reader's speed must not decide."""
        while source == "file" and not ahead._ahead.full() and not read_whole.is_set():
            sleep(0.001)
        return take(ahead)

    take = Prefetched.__next__
    monkeypatch.setattr(Prefetched, "__next__", wait_until_full)

    session, plain = VideoSession(model, ["dog"]), VideoSession(model, ["dog"])
    ahead = prefetch_frames(session, frames())
    for number, image in enumerate(images):
        frame, encoded = next(ahead)
        assert frame.index == number
        assert_same(session.step(encoded), plain.step(image))
        done.release()
    with pytest.raises(FrameDecodeError, match="broken"):
        next(ahead)
    assert max(sizes) == together and sum(sizes) == len(images)


def test_rejects_sessions_of_different_models(model: RefSAM) -> None:
    turns = [(VideoSession(m, ["dog"]), video(0)[0]) for m in (model, tiny_model(seed=1))]
    with pytest.raises(ValueError, match="turns: got sessions of different models"):
        step_batch(turns)


def test_prepared_frames_equal_plain_ones(model: RefSAM) -> None:
    session, prepare = VideoSession(model, VIDEOS[0][0]), FramePreparer(model)
    for frame, expected in zip(video(0), alone(model, 0), strict=True):
        assert torch.equal(session.step(prepare(frame)).logits, expected.logits)
    with pytest.raises(ValueError, match="frame: got dtype float32, want uint8 RGB"):
        prepare(np.zeros((4, 4, 3), np.float32))


def test_uploads_go_through_two_buffers(model: RefSAM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU with a stand-in for its streams; that a copy is waited for only a GPU can show."""
    cuda_stand_in.install(monkeypatch)
    made: list[torch.Size] = []

    def pinned(frame: torch.Tensor, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(frame.shape)
        return torch.empty(frame.shape, dtype=frame.dtype)

    prepare = FramePreparer(model)
    prepare._upload = preparation._Upload(torch.device("cpu"))
    monkeypatch.setattr(torch, "empty_like", pinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    session = VideoSession(model, VIDEOS[0][0])
    prepared = [prepare(frame) for frame in video(0)[:2]]
    assert all(isinstance(frame, PreparedFrame) and frame.ready for frame in prepared)
    for frame, expected in zip(prepared, alone(model, 0), strict=False):
        assert torch.equal(session.step(frame).logits, expected.logits)
    assert len(made) == 2
    prepare(video(0)[2])
    prepare(video(1)[0])
    assert made[2:] == [(64, 64, 3)]
