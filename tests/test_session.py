"""The session: frame by frame equal to the model's own functions, with a state that does not grow."""

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refsam import FrameResult, RefSAM, VideoSession, segment_video
from refsam.errors import UserError
from refsam.session import PreparedFrame, streaming
from refsam.video import FrameDecodeError, open_source
from tests.heap import bytes_left_by
from tests.tiny_model import tiny_model
from tests.video.clips import picture, write_video

EXPRESSIONS = ["the red cup", "the person on the left of the green car", "dog"]


@pytest.fixture(scope="module")
def model() -> RefSAM:
    return tiny_model()


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    noise = np.random.default_rng(0)
    return [
        np.clip(picture(i, 45, 70) + noise.integers(-20, 20, (45, 70, 3)), 0, 255).astype(np.uint8)
        for i in range(6)
    ]


def logits_of(model: RefSAM, frames: list[np.ndarray], expressions: list[str]) -> torch.Tensor:
    session = VideoSession(model, expressions)
    return torch.stack([session.step(frame).logits for frame in frames])


def test_result_has_the_promised_shapes(model: RefSAM, frames: list[np.ndarray]) -> None:
    session = VideoSession(model, EXPRESSIONS)
    for index, frame in enumerate(frames):
        result = session.step(frame)
        assert result.frame_index == index
        assert (result.masks.shape, result.masks.dtype) == ((3, 45, 70), torch.bool)
        assert (result.logits.shape, result.logits.dtype) == ((3, 16, 16), torch.float32)
        assert (result.scores.shape, result.scores.dtype) == ((3,), torch.float32)
        assert 0 <= result.scores.min() <= result.scores.max() <= 1
        assert not result.logits.requires_grad


def test_equals_the_model_called_by_hand(model: RefSAM, frames: list[np.ndarray]) -> None:
    text, track = model.encode_text(EXPRESSIONS), None
    with torch.no_grad():
        for frame, logits in zip(frames, logits_of(model, frames, EXPRESSIONS), strict=True):
            pixels, _ = model.preprocess(torch.from_numpy(frame)[None])
            output = model.decode(model.encode_image(pixels), text, None, track)
            track = output.track_token
            assert torch.equal(logits, output.logits)


def test_the_past_matters_and_reset_forgets_it(model: RefSAM, frames: list[np.ndarray]) -> None:
    session = VideoSession(model, EXPRESSIONS)
    first = session.step(frames[0]).logits
    assert not torch.equal(session.step(frames[0]).logits, first)
    session.reset()
    result = session.step(frames[0])
    assert result.frame_index == 0
    assert torch.equal(result.logits, first)


def test_masks_are_the_positive_logits_at_the_frames_size(model: RefSAM) -> None:
    frame = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    result = VideoSession(model, ["the red cup"]).step(frame)
    upscaled = torch.nn.functional.interpolate(result.logits[None], (64, 64), mode="bilinear")[0]
    assert torch.equal(result.masks, upscaled > 0)


@pytest.mark.parametrize("kind", ["torch", "reversed", "read-only", "strided"])
def test_frames_of_any_memory_layout(model: RefSAM, kind: str, frames: list[np.ndarray]) -> None:
    frame = frames[0]
    same: np.ndarray | torch.Tensor = {
        "torch": torch.from_numpy(frame),
        "reversed": np.ascontiguousarray(frame[..., ::-1])[..., ::-1],
        "read-only": np.frombuffer(frame.tobytes(), np.uint8).reshape(frame.shape),
        "strided": np.repeat(frame, 2, axis=1)[:, ::2],
    }[kind]
    expected = VideoSession(model, EXPRESSIONS).step(frame).logits
    assert torch.equal(VideoSession(model, EXPRESSIONS).step(same).logits, expected)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "frame: got dtype float32, want uint8 RGB"),
        (torch.zeros(4, 4, 3), "frame: got dtype torch.float32, want uint8 RGB"),
        (np.zeros((4, 4, 4), np.uint8), r"frame: got shape \(4, 4, 4\), want \(H, W, 3\)"),
        (np.zeros((4, 4), np.uint8), r"frame: got shape \(4, 4\), want \(H, W, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"frame: got shape \(0, 4, 3\), want \(H, W, 3\)"),
        ("frame.png", "frame: got str, want a numpy array or a torch tensor"),
    ],
)
def test_rejects_other_frames(model: RefSAM, frame: object, message: str) -> None:
    session = VideoSession(model, ["the red cup"])
    with pytest.raises(ValueError, match=message):
        session.step(frame)  # type: ignore[arg-type]
    assert session.step(np.zeros((4, 4, 3), np.uint8)).frame_index == 0


def test_added_expression_starts_without_a_past(model: RefSAM, frames: list[np.ndarray]) -> None:
    session = VideoSession(model, EXPRESSIONS[:2])
    session.step(frames[0])
    assert session.add(EXPRESSIONS[2]) == 2
    assert session.expressions == tuple(EXPRESSIONS)
    together = session.step(frames[1]).logits
    assert torch.allclose(together[:2], logits_of(model, frames[:2], EXPRESSIONS[:2])[1], atol=1e-5)
    assert torch.allclose(
        together[2:], logits_of(model, frames[1:2], EXPRESSIONS[2:])[0], atol=1e-5
    )


def test_removed_expression_leaves_the_others_as_they_were(
    model: RefSAM, frames: list[np.ndarray]
) -> None:
    session = VideoSession(model, EXPRESSIONS)
    session.step(frames[0])
    session.remove(1)
    assert session.expressions == ("the red cup", "dog")
    expected = logits_of(model, frames[:2], ["the red cup", "dog"])[1]
    assert torch.allclose(session.step(frames[1]).logits, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"index: got 2, want 0\.\.1"):
        session.remove(2)


def test_session_without_expressions(model: RefSAM, frames: list[np.ndarray]) -> None:
    session = VideoSession(model)
    result = session.step(frames[0])
    assert result.masks.shape == (0, 45, 70)
    assert result.logits.shape == (0, 16, 16)
    session.add("dog")
    first = session.step(frames[1]).logits
    assert torch.equal(first, logits_of(model, frames[1:2], ["dog"])[0])
    session.remove(0)
    assert session.step(frames[2]).frame_index == 2
    session.add("dog")
    assert torch.equal(session.step(frames[1]).logits, first)


def test_refused_expression_changes_nothing(model: RefSAM, frames: list[np.ndarray]) -> None:
    for bad in ["", "  ", "xqzzy wqrtl", "red " * 1000]:
        with pytest.raises(UserError):
            VideoSession(model, [bad])
    session = VideoSession(model, EXPRESSIONS)
    with pytest.raises(UserError):
        session.add("xqzzy")
    assert session.step(frames[0]).masks.shape[0] == 3
    with pytest.raises(ValueError, match="expressions: got the string 'dog'"):
        VideoSession(model, "dog")


def test_unknown_words_are_named(model: RefSAM) -> None:
    session = VideoSession(model, ["the red xqzzy", "dog"])
    assert session.unknown_words == (("xqzzy",), ())


def test_new_weights_are_heeded_at_once(model: RefSAM, frames: list[np.ndarray]) -> None:
    mine = tiny_model(seed=1)
    session = VideoSession(mine, EXPRESSIONS)
    session.step(frames[0])
    mine.load_state_dict(model.state_dict())
    session.reset()
    assert torch.equal(session.step(frames[0]).logits, logits_of(model, frames[:1], EXPRESSIONS)[0])


def test_frames_may_change_their_size(model: RefSAM, frames: list[np.ndarray]) -> None:
    session = VideoSession(model, ["dog"])
    session.step(frames[0])
    assert session.step(np.zeros((30, 20, 3), np.uint8)).masks.shape == (1, 30, 20)


def test_threads_share_one_model(model: RefSAM, frames: list[np.ndarray]) -> None:
    expected = {text: logits_of(model, frames, [text]) for text in EXPRESSIONS}
    found: dict[str, torch.Tensor] = {}

    def run(text: str) -> None:
        found[text] = logits_of(model, frames, [text])

    threads = [threading.Thread(target=run, args=(text,)) for text in EXPRESSIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[text], expected[text]) for text in EXPRESSIONS)


# Whole videos


def test_segment_video_equals_the_session(model: RefSAM, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")
    with open_source(path) as source:
        images = [frame.image for frame in source]
    expected = logits_of(model, images, EXPRESSIONS)
    # Frames that are encoded together may differ from single ones in the last bits, as those of any batch.
    same = partial(torch.testing.assert_close, expected=expected, atol=1e-5, rtol=0)
    results = list(segment_video(model, path, EXPRESSIONS))
    assert [result.frame_index for result in results] == list(range(12))
    same(torch.stack([result.logits for result in results]))
    same(torch.stack([result.logits for result in segment_video(model, iter(images), EXPRESSIONS)]))


def test_segment_video_equals_the_session_to_the_bit_frame_by_frame(
    model: RefSAM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_MOST_TOGETHER", 1)
    path = write_video(tmp_path / "clip.mp4")
    with open_source(path) as source:
        expected = logits_of(model, [frame.image for frame in source], EXPRESSIONS)
    results = segment_video(model, path, EXPRESSIONS)
    assert torch.equal(torch.stack([result.logits for result in results]), expected)


def test_segment_video_yields_what_came_before_a_damaged_frame(
    model: RefSAM, tmp_path: Path
) -> None:
    for index in range(3):
        Image.fromarray(picture(index)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:90])
    seen = []
    with pytest.raises(FrameDecodeError, match="frame 2"):
        seen.extend(segment_video(model, tmp_path, ["dog"]))
    assert len(seen) == 2


def test_bad_expression_is_reported_by_the_call_itself(model: RefSAM) -> None:
    with pytest.raises(UserError):
        segment_video(model, "nowhere.mp4", [""])


def test_reading_and_segmenting_overlap(model: RefSAM, monkeypatch: pytest.MonkeyPatch) -> None:
    read = [threading.Event() for _ in range(6)]
    real_step = VideoSession.step

    def step_while_the_next_is_read(session: VideoSession, frame: PreparedFrame) -> FrameResult:
        following = min(session.frame_index + 1, 5)
        assert read[following].wait(300)
        return real_step(session, frame)

    def frames() -> Iterator[np.ndarray]:
        for index, event in enumerate(read):
            event.set()
            yield np.full((8, 8, 3), index, np.uint8)

    monkeypatch.setattr(VideoSession, "step", step_while_the_next_is_read)
    assert len(list(segment_video(model, frames(), ["dog"]))) == 6


def test_frames_leave_nothing_in_the_heap(model: RefSAM, frames: list[np.ndarray]) -> None:
    """Some hundred bytes a frame, never freed, kept arrays from lying where others had lain: 200 MiB in 10,000 frames."""
    session = VideoSession(model, ["the red circle", "the blue square"])
    assert bytes_left_by(lambda: session.step(frames[0]), times=50) < 16


def test_nothing_of_past_frames_is_kept(model: RefSAM) -> None:
    alive: list[weakref.ref] = []

    def frames() -> Iterator[np.ndarray]:
        for index in range(200):
            frame = np.full((24, 32, 3), index, np.uint8)
            alive.append(weakref.ref(frame))
            yield frame

    most = 0
    for result in segment_video(model, frames(), ["dog", "the red cup"]):
        alive += [weakref.ref(tensor) for tensor in (result.masks, result.logits, result.scores)]
        alive[:] = [reference for reference in alive if reference() is not None]
        most = max(most, len(alive))
    # Up to 6 frames that have been read, 5 groups of frames that are or wait to be encoded, and two turns: not 200 of each.
    assert most <= 6 + 5 * streaming._MOST_TOGETHER + 8
