"""Segment a video frame by frame with a memory that does not grow: one track token per expression."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from refsam_kernels import mask_postprocess

if TYPE_CHECKING:
    from refsam.model import RefSAM, TextPrompt


@dataclass(frozen=True, slots=True)
class FrameResult:
    """What the model says about one frame; tensors are on the model's device.

    Attributes:
        frame_index: number of the frame since the session began or was reset, from 0.
        masks: ``(E, H, W)`` bool at the frame's own size; all False where the object is not in view.
        logits: ``(E, 4h, 4w)`` float32 over the padded square that the model sees.
        scores: ``(E,)`` float32 in 0..1, the IoU that the model predicts for its mask.
    """

    frame_index: int
    masks: Tensor
    logits: Tensor
    scores: Tensor


class VideoSession:
    """Frames in, masks out, online. Sessions in several threads may share one model.

    The state is one track token ``(C,)`` per expression (model.md, section 1); frames may change their
    size in between.

    Args:
        model: a `RefSAM` in evaluation mode, on any device.
        expressions: what to segment, for instance ``["the red cup"]``; may be empty at first.
        optimize: call `model.optimize()` if nobody has; False leaves the model as it is.

    Raises:
        UserError: an expression that is empty, too long, or of which the model knows no word.
    """

    def __init__(
        self, model: "RefSAM", expressions: Sequence[str] = (), *, optimize: bool = True
    ) -> None:
        if isinstance(expressions, str):
            raise ValueError(f"expressions: got the string {expressions!r}, want a list of strings")
        if optimize and not model.is_optimized and not model.training:
            model.optimize()
        self.model = model
        self._expressions = list(expressions)
        self._unknown = list(self._encode(self._expressions).unknown) if expressions else []
        self._track: Tensor | None = None  # (E, C); None before the first frame
        self._has_track = [False] * len(self._expressions)
        self._frame_index = 0

    @property
    def expressions(self) -> tuple[str, ...]:
        """The expressions, in the order of the masks."""
        return tuple(self._expressions)

    @property
    def unknown_words(self) -> tuple[tuple[str, ...], ...]:
        """Per expression, the words that the model does not know and so cannot heed."""
        return tuple(self._unknown)

    def step(self, frame: np.ndarray | Tensor) -> FrameResult:
        """Segment the next frame.

        Args:
            frame: ``(H, W, 3)`` uint8 RGB, numpy or torch, on any device.

        Raises:
            ValueError: another shape or dtype.
        """
        pixels = _as_tensor(frame).to(self.model.device)
        with torch.no_grad():
            logits, masks, scores = (
                self._segment(pixels) if self._expressions else self._nothing(pixels)
            )
        result = FrameResult(self._frame_index, masks, logits, scores)
        self._frame_index += 1
        return result

    def add(self, expression: str) -> int:
        """Ask for one more object from the next frame on; returns its index in the masks.

        Raises:
            UserError: as the constructor does; the session then stays as it was.
        """
        self._unknown += self._encode([expression]).unknown
        self._expressions.append(expression)
        self._has_track.append(False)
        if self._track is not None:
            self._track = torch.cat([self._track, torch.zeros_like(self._track[:1])])
        return len(self._expressions) - 1

    def remove(self, index: int) -> None:
        """Stop asking for an expression; those behind it move up by one.

        Raises:
            ValueError: no expression has that index.
        """
        if not 0 <= index < len(self._expressions):
            raise ValueError(f"index: got {index}, want 0..{len(self._expressions) - 1}")
        for per_expression in (self._expressions, self._unknown, self._has_track):
            del per_expression[index]
        if self._track is not None:
            self._track = torch.cat([self._track[:index], self._track[index + 1 :]])
        if not self._expressions:
            self._track = None

    def reset(self) -> None:
        """Forget the objects' history and count frames from 0, as before a new video."""
        self._track = None
        self._has_track = [False] * len(self._expressions)
        self._frame_index = 0

    def _encode(self, expressions: list[str]) -> "TextPrompt":
        with torch.no_grad():
            return self.model.encode_text(expressions)

    def _segment(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(E, 4h, 4w)``, masks ``(E, H, W)`` and scores ``(E,)`` of one frame."""
        batch, size = self.model.preprocess(pixels[None])
        image = self.model.encode_image(batch)
        text = self._encode(self._expressions)  # from the model's cache, so never of older weights
        valid = None if self._track is None else torch.tensor(self._has_track, device=pixels.device)
        output = self.model.decode(image, text, None, self._track, valid)
        self._track = output.track_token
        self._has_track = [True] * len(self._expressions)
        logits = output.logits.float()
        masks = mask_postprocess(
            logits,
            image_size=self.model.image_size,
            input_size=size.resized,
            output_size=size.original,
        )
        return logits, masks, output.iou.float().clamp(0, 1)

    def _nothing(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a session without expressions sees."""
        side = self.model.image_size // self.model.config.image_encoder.patch_size * 4
        logits = pixels.new_zeros(0, side, side, dtype=torch.float32)
        return logits, pixels.new_zeros(0, *pixels.shape[:2], dtype=torch.bool), logits.new_zeros(0)


def segment_video(
    model: "RefSAM",
    source: str | os.PathLike[str] | Iterable[np.ndarray | Tensor],
    expressions: Sequence[str],
    *,
    optimize: bool = True,
) -> Iterator[FrameResult]:
    """Yield the masks of each frame while the next frames are read in another thread.

    Args:
        model: a `RefSAM` in evaluation mode.
        source: whatever `refsam.video.open_source` takes (video, folder of images, image, camera), or
            any iterable of ``(H, W, 3)`` uint8 RGB frames.
        expressions: what to segment.
        optimize: as for `VideoSession`.

    Raises:
        UserError: an expression or the source cannot be used; `FrameDecodeError` after the last good frame.
    """
    return _step_through(VideoSession(model, expressions, optimize=optimize), source)


def _step_through(
    session: VideoSession, source: str | os.PathLike[str] | Iterable[np.ndarray | Tensor]
) -> Iterator[FrameResult]:
    from refsam.video import open_source, prefetch

    if not isinstance(source, str | os.PathLike):
        with closing(prefetch(source)) as images:
            yield from map(session.step, images)
        return
    with open_source(source) as reader, closing(prefetch(reader)) as frames:
        for frame in frames:
            yield session.step(frame.image)


def _as_tensor(frame: np.ndarray | Tensor) -> Tensor:
    if not isinstance(frame, np.ndarray | Tensor):
        raise ValueError(f"frame: got {type(frame).__name__}, want a numpy array or a torch tensor")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"frame: got shape {tuple(frame.shape)}, want (H, W, 3)")
    if frame.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"frame: got dtype {frame.dtype}, want uint8 RGB")
    if isinstance(frame, np.ndarray):
        return torch.from_numpy(
            np.require(frame, requirements=["C", "W"])
        )  # copies only where it must
    return frame
