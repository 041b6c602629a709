"""Segment a video frame by frame with a memory that does not grow: one track token per expression."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from refsam.session.cuda_graphs import FrameGraphs
from refsam.session.preparation import EncodedFrame, PreparedFrame, prepare_now
from refsam.session.track_state import TrackState
from refsam_kernels import mask_postprocess

if TYPE_CHECKING:
    from refsam.model import PromptedSAM, TextPrompt
    from refsam.model.features import FrameSize, ImageFeatures
    from refsam.model.packing import Packing


AnyFrame = np.ndarray | Tensor | PreparedFrame | EncodedFrame


@dataclass(frozen=True, slots=True)
class FrameResult:
    """The masks of one frame; tensors are on the model's device.

    Attributes:
        frame_index: number of the frame since the session began or was reset, from 0.
        masks: ``(E, H, W)`` bool at the frame's own size; all False where the object is not in view.
        logits: ``(E, 4h, 4w)`` float32 over the padded square that the model sees.
        scores: ``(E,)`` float32 in 0..1, the predicted IoU of each mask.
    """

    frame_index: int
    masks: Tensor
    logits: Tensor
    scores: Tensor

    def on_host(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks and scores as arrays in host memory; from a GPU they are copied through pinned memory, and waited for."""
        if self.masks.device.type != "cuda":
            return self.masks.numpy(), self.scores.numpy()
        found = [
            torch.empty_like(t, device="cpu", pin_memory=True) for t in (self.masks, self.scores)
        ]
        for host, tensor in zip(found, (self.masks, self.scores), strict=True):
            host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self.masks.device).synchronize()
        return found[0].numpy(), found[1].numpy()


@dataclass(frozen=True, slots=True)
class FrameLogits:
    """A frame's logits, before they are resized and thresholded to masks; tensors are on the model's device.

    Attributes:
        frame_index: as in `FrameResult`.
        logits: ``(E, 4h, 4w)`` float32 over the padded square that the model sees.
        scores: ``(E,)`` float32 in 0..1.
        size: of the frame, and of its copy inside the square.
    """

    frame_index: int
    logits: Tensor
    scores: Tensor
    size: "FrameSize"


class VideoSession:
    """Frames in, masks out, online. Sessions in several threads may share one model.

    The state is one track token ``(C,)`` per expression (model.md, section 1). The frames may change their size.

    Args:
        model: a `RefSAM` or `EVFSAM` in evaluation mode, on any device.
        expressions: what to segment, for instance ``["the red cup"]``; may be empty at first.
        optimize: call `model.optimize()` if nobody has; False leaves the model as it is.
        graphs: CUDA graphs of the model, which sessions may share; None launches the kernels one by one.
        threshold: pixels with a higher probability than this belong to a mask.

    Raises:
        UserError: an expression that is empty, too long, or has no word that the model knows.
        ValueError: graphs of another model, or a threshold outside 0..1.
    """

    def __init__(
        self,
        model: "PromptedSAM",
        expressions: Sequence[str] = (),
        *,
        optimize: bool = True,
        graphs: FrameGraphs | None = None,
        threshold: float = 0.5,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: got {threshold}, want a probability between 0 and 1")
        if isinstance(expressions, str):
            raise ValueError(f"expressions: got the string {expressions!r}, want a list of strings")
        if optimize and not model.is_optimized and not model.training:
            model.optimize()
        if graphs is not None and graphs.model is not model:
            raise ValueError("graphs: got those of another model")
        self.model = model
        self.graphs = graphs
        self._runner = model if graphs is None else graphs
        self._least_logit = math.log(threshold / (1 - threshold))
        self._expressions = list(expressions)
        # Prompts of all expressions, and the packing of fixed weights that they belong to.
        self._text: tuple[Packing, TextPrompt] | None = None
        self._unknown = list(self._encode(self._expressions).unknown) if expressions else []
        self._track: Tensor | None = None  # (E, C); None before the first frame
        self._has_track = [False] * len(self._expressions)
        self._frame_index = 0

    @property
    def expressions(self) -> tuple[str, ...]:
        """The expressions, in the order of the masks."""
        return tuple(self._expressions)

    @property
    def frame_index(self) -> int:
        """Number of frames since the start or the last reset: the index of the next frame."""
        return self._frame_index

    @property
    def unknown_words(self) -> tuple[tuple[str, ...], ...]:
        """For each expression, the words that the model does not know and therefore ignores."""
        return tuple(self._unknown)

    def step(self, frame: AnyFrame) -> FrameResult:
        """Segment the next frame.

        Args:
            frame: ``(H, W, 3)`` uint8 RGB, numpy or torch, on any device; or the output of `FramePreparer` or
                `prefetch_frames` for it.

        Raises:
            ValueError: another shape or dtype.
        """
        return step_batch([(self, frame)])[0]

    def step_logits(self, frame: AnyFrame) -> FrameLogits:
        """As `step`, without the masks: for your own threshold and resizing, as benchmarks need them."""
        return _step_all([(self, frame)])[0]

    def add(self, expression: str) -> int:
        """Add an expression, starting with the next frame; returns its index in the masks.

        Raises:
            UserError: as in the constructor; the session then stays unchanged.
        """
        self._unknown += self._encode([expression]).unknown
        self._text = None
        self._expressions.append(expression)
        self._has_track.append(False)
        if self._track is not None:
            self._track = torch.cat([self._track, torch.zeros_like(self._track[:1])])
        return len(self._expressions) - 1

    def remove(self, index: int) -> None:
        """Remove an expression; later ones move up by one.

        Raises:
            ValueError: no expression has that index.
        """
        if not 0 <= index < len(self._expressions):
            raise ValueError(f"index: got {index}, want 0..{len(self._expressions) - 1}")
        for per_expression in (self._expressions, self._unknown, self._has_track):
            del per_expression[index]
        self._text = None
        if self._track is not None:
            self._track = torch.cat([self._track[:index], self._track[index + 1 :]])
        if not self._expressions:
            self._track = None

    def reset(self) -> None:
        """Forget the objects' history and count frames from 0, for a new video."""
        self._track = None
        self._has_track = [False] * len(self._expressions)
        self._frame_index = 0

    @property
    def state(self) -> TrackState:
        """The state that the next frame starts from. Cheap to keep: no later step changes it."""
        return TrackState(self._track, tuple(self._has_track), self._frame_index)

    def restore(self, state: TrackState) -> None:
        """Continue from the state of another session with the same model and expressions.

        Raises:
            ValueError: another number of expressions.
        """
        if len(state.has_track) != len(self._expressions):
            raise ValueError(
                f"state: got {len(state.has_track)} expressions, want {len(self._expressions)}"
            )
        self._track = None if state.track is None else state.track.to(self.model.device)
        self._has_track = list(state.has_track)
        self._frame_index = state.frame_index

    def _encode(self, expressions: list[str]) -> "TextPrompt":
        with torch.no_grad():
            return self.model.encode_text(expressions)

    def _prompts(self) -> "TextPrompt":
        """The expressions as prompts, never of older weights."""
        fixed = self.model.fixed_packing
        if fixed is None:
            return self._encode(self._expressions)
        if self._text is None or self._text[0] is not fixed:
            self._text = fixed, self._encode(self._expressions)
        return self._text[1]

    def _found(
        self, logits: Tensor, scores: Tensor, size: "FrameSize", track: Tensor | None = None
    ) -> FrameLogits:
        """The frame's result; the track tokens (E, C) are kept for the next frame."""
        self._track = track
        self._has_track = [True] * len(self._expressions)
        self._frame_index += 1
        return FrameLogits(self._frame_index - 1, logits, scores, size)

    def _with_masks(self, found: FrameLogits) -> FrameResult:
        if len(found.logits):
            masks = mask_postprocess(
                found.logits,
                image_size=self.model.image_size,
                input_size=found.size.resized,
                output_size=found.size.original,
                threshold=self._least_logit,
            )
        else:
            masks = found.logits.new_zeros(0, *found.size.original, dtype=torch.bool)
        return FrameResult(found.frame_index, masks, found.logits, found.scores)

    def _nothing(self, frame: PreparedFrame | EncodedFrame) -> FrameLogits:
        """The empty result of a session without expressions."""
        side = self.model.image_size // self.model.config.image_encoder.patch_size * 4
        logits = torch.zeros(0, side, side, device=self.model.device)
        return self._found(logits, logits.new_zeros(0), frame.size)


def step_batch(turns: Sequence[tuple[VideoSession, AnyFrame]]) -> list[FrameResult]:
    """Segment frames of several videos, or several of one, with one pass of the image encoder for each shape of frames.

    Expressions of different videos are decoded together too. The results, in the order of the turns, equal those of
    `VideoSession.step` one by one; logits differ by at most 1e-5.

    Args:
        turns: pairs of a session and its next frame, as for `VideoSession.step`; frames of one session in their order.

    Raises:
        ValueError: sessions of different models or graphs, another frame, or encoded frames among others.
    """
    with torch.no_grad():
        found = _step_all(turns)
        return [session._with_masks(each) for (session, _), each in zip(turns, found, strict=True)]


def _step_all(turns: Sequence[tuple[VideoSession, AnyFrame]]) -> list[FrameLogits]:
    """`step_batch` without masks."""
    if any(session._runner is not turns[0][0]._runner for session, _ in turns):
        raise ValueError("turns: got sessions of different models or graphs, want those of one")
    with torch.no_grad():
        ready = [
            (s, f if isinstance(f, PreparedFrame | EncodedFrame) else prepare_now(s.model, f))
            for s, f in turns
        ]
        found = iter(_step_asked([turn for turn in ready if turn[0].expressions]))
        return [next(found) if session.expressions else session._nothing(f) for session, f in ready]


def _step_asked(
    turns: list[tuple[VideoSession, PreparedFrame | EncodedFrame]],
) -> list[FrameLogits]:
    """`_step_all` of sessions that have expressions."""
    if not turns:
        return []
    sessions, frames = [session for session, _ in turns], [frame for _, frame in turns]
    if len({isinstance(frame, EncodedFrame) for frame in frames}) > 1:
        raise ValueError("turns: got encoded frames among others, want one kind")
    results: dict[int, FrameLogits] = {}
    alike = _groups([_shape(frame) for frame in frames])  # frames of one shape are encoded together
    images = [
        image_features(sessions[0]._runner, [frames[turn] for turn in group]) for group in alike
    ]
    # Rounds in which each session occurs at most once.
    for round_ in zip_longest(*_groups([id(session) for session in sessions])):
        for image, encoded in zip(images, alike, strict=True):
            part = [turn for turn in round_ if turn in encoded]
            if not part:
                continue
            at = [sessions[turn] for turn in part], [frames[turn].size for turn in part]
            rows = [encoded.index(turn) for turn in part]
            results |= zip(part, _decode(image, rows, *at), strict=True)
    return [results[turn] for turn in range(len(sessions))]


def _shape(frame: PreparedFrame | EncodedFrame) -> tuple[int, ...]:
    """The shape at the image encoder; without `padding: none` all frames have the same."""
    return frame.image.grid if isinstance(frame, EncodedFrame) else tuple(frame.pixels.shape)


def _groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """The indices of equal keys, in the order in which each key first occurs."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def image_features(
    runner: "PromptedSAM | FrameGraphs", frames: Sequence[PreparedFrame | EncodedFrame]
) -> "ImageFeatures":
    """The image encoder's features of frames of one shape."""
    inputs = [frame.wait() for frame in frames if isinstance(frame, PreparedFrame)]
    images = [frame.image for frame in frames if isinstance(frame, EncodedFrame)]
    if len(inputs) == 1:
        return runner.encode_image(*inputs[0])
    if inputs:
        return runner.encode_image(*(torch.cat(parts) for parts in zip(*inputs, strict=True)))
    return images[0] if len(images) == 1 else images[0].cat(images)


def _decode(
    image: "ImageFeatures",
    rows: list[int],
    sessions: list[VideoSession],
    sizes: list["FrameSize"],
) -> list[FrameLogits]:
    """Decode one frame of each session: row `rows[i]` of the image belongs to session i."""
    counts = [len(session.expressions) for session in sessions]
    texts = [session._prompts() for session in sessions]
    text = texts[0] if len(texts) == 1 else texts[0].cat(texts)
    track, valid = _tracks(sessions)
    index = None
    if len(image.embedding) > 1:
        repeated = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        index = torch.tensor(repeated, device=image.embedding.device)
    output = sessions[0]._runner.decode(image, text, index, track, valid)
    results = []
    parts = (output.logits.float(), output.iou.float().clamp(0, 1), output.track_token)
    each = zip(*(part.split(counts) for part in parts), strict=True)
    for session, size, (logits, scores, token) in zip(sessions, sizes, each, strict=True):
        results.append(session._found(logits, scores, size, token))
    return results


def _tracks(sessions: list[VideoSession]) -> tuple[Tensor | None, Tensor | None]:
    """The track tokens (P, C) of all sessions, None if none has one yet; and which are valid, None if all are."""
    known = next((s._track for s in sessions if s._track is not None), None)
    if known is None:
        return None, None
    tracks = [
        known.new_zeros(len(s.expressions), known.shape[1]) if s._track is None else s._track
        for s in sessions
    ]
    has_track = [has for session in sessions for has in session._has_track]
    track = tracks[0] if len(tracks) == 1 else torch.cat(tracks)
    valid = None if all(has_track) else torch.tensor(has_track, device=track.device)
    return track, valid
