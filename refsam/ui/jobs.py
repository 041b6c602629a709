"""Segment one visitor's clip in a thread of its own, while finished frames can be looked at."""

import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from refsam.errors import UserError
from refsam.images import encode_jpeg
from refsam.runtime.device import autocast
from refsam.runtime.files import write_zip
from refsam.ui.uploads import Limits, open_upload
from refsam.video import Frame, FrameDecodeError, FrameSource, ResultWriter, draw_overlay, prefetch
from refsam.video.captions import caption

if TYPE_CHECKING:
    import torch

    from refsam.model import PromptedSAM
    from refsam.session import PreparedFrame, VideoSession

log = logging.getLogger(__name__)

_PREVIEW_SIDE = 960  # pixels; the downloads have the clip's own size
_UPDATES_PER_SECOND = 12.0  # more would only cost time
_PATIENCE = 0.2  # seconds between checks for a cancelled job


@dataclass(frozen=True)
class Engine:
    """The model that all visitors share, and how it computes.

    Attributes:
        name: of the checkpoint.
        model: in evaluation mode, on its device.
        precision: autocast dtype; float32 means no autocast.
    """

    name: str
    model: "PromptedSAM"
    precision: "torch.dtype"


@dataclass(frozen=True)
class Downloads:
    """Files of a job that has ended: masks as PNGs in a zip, as run lengths in JSON, and the overlay as MP4."""

    masks: Path
    run_lengths: Path
    overlay: Path


@dataclass(frozen=True)
class Progress:
    """Progress of a job.

    Attributes:
        frames: number of finished frames; each of them has a preview.
        expected: number of frames, if the clip's file contains it.
        rate: frames per second so far.
        unknown: per expression, the words that the model does not know.
    """

    frames: int = 0
    expected: int | None = None
    rate: float = 0.0
    unknown: tuple[tuple[str, ...], ...] = ()


class Job:
    """One clip and its expressions, segmented by `start` in a thread of its own.

    Args:
        engine: the model.
        turn: lock that is held while computing, so that jobs of several visitors run one after another.
        upload: the clip.
        root: the only folder that files are read from.
        folder: is created for results and previews.
        expressions: what to segment.
        limits: on the clip.
    """

    def __init__(
        self,
        engine: Engine,
        turn: threading.Lock,
        upload: Path,
        root: Path,
        folder: Path,
        expressions: Sequence[str],
        limits: Limits,
    ) -> None:
        self.expressions = list(expressions)
        self.progress = Progress()
        self.error: str | None = None
        self.notes: tuple[str, ...] = ()
        self.downloads: Downloads | None = None
        self._engine, self._turn, self._limits = engine, turn, limits
        self._upload, self._root, self._folder = upload, root, folder
        self.stopped_by: str | None = None  # the reason why the job ended before the clip did
        self._cancelled = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="refsam-job", daemon=True)

    def start(self) -> None:
        """Begin as soon as no other job computes."""
        self._thread.start()

    def cancel(self) -> None:
        """Stop after the current frame; the finished frames are kept."""
        self._cancelled.set()

    def discard(self) -> None:
        """Cancel, wait for the end and remove all files."""
        self.cancel()
        if self._thread.ident is not None:
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def running(self) -> bool:
        """Whether the job may still add frames."""
        return self._thread.is_alive()

    def updates(self) -> Iterator[Progress]:
        """Yield the newest progress several times per second until the job has ended."""
        while self.running:
            if self._changed.wait(_PATIENCE):
                self._changed.clear()
                yield self.progress
                time.sleep(1 / _UPDATES_PER_SECOND)

    def preview(self, index: int) -> bytes:
        """The overlay of a frame that is done, as JPEG."""
        return self._preview_file(index).read_bytes()

    def _preview_file(self, index: int) -> Path:
        return self._folder / "previews" / f"{int(index):05d}.jpg"

    def _work(self) -> None:
        try:
            while not self._turn.acquire(timeout=_PATIENCE):
                if self._cancelled.is_set():
                    return
            try:
                self._segment()
            finally:
                self._turn.release()
        except UserError as error:
            self.error = str(error).replace(str(self._upload), self._upload.name)
        except Exception:  # for any error the page must say that there will be no masks
            log.exception("a job failed")
            self.error = "the clip could not be segmented; the terminal says why"

    def _segment(self) -> None:
        from refsam.session import VideoSession
        from refsam.session.preparation import prepare_all
        from refsam.video.frames import source_facts

        (self._folder / "previews").mkdir(parents=True)
        out = self._folder / "results"
        session = VideoSession(self._engine.model, self.expressions)
        with open_upload(self._upload, self._root, self._limits) as source:
            writer = ResultWriter(
                out,
                self.expressions,
                fps=source.fps,
                time_base=source.time_base,
                formats=("png", "rle"),
                sound=source.sound,
            )
            with writer, closing(prefetch(prepare_all(session.model, source))) as frames:
                try:
                    self._step_through(session, source, frames, writer)
                except FrameDecodeError as error:
                    self.stopped_by = str(error).replace(str(self._upload), self._upload.name)
                if self.progress.frames:
                    facts: dict[str, Any] = {
                        "refsam": version("refsam"),
                        "model": self._engine.name,
                        "source": self._upload.name,
                        "complete": self.stopped_by is None,
                        "stopped_by": self.stopped_by,
                        "device": str(self._engine.model.device),
                    }
                    writer.finish(**facts, **source_facts(source))
                    self.notes = tuple(source.notes)
        if self.progress.frames:
            pngs = (path.relative_to(out).as_posix() for path in out.glob("masks/*/*.png"))
            write_zip(out / "masks.zip", out, ["result.json", *pngs])
            self.downloads = Downloads(out / "masks.zip", out / "masks.json", out / "overlay.mp4")

    def _step_through(
        self,
        session: "VideoSession",
        source: FrameSource,
        frames: Iterable[tuple[Frame, "PreparedFrame"]],
        writer: ResultWriter,
    ) -> None:
        device, precision = self._engine.model.device, self._engine.precision
        begun = time.perf_counter()
        with autocast(device, precision):
            for frame, prepared in frames:
                if self._cancelled.is_set():
                    self.stopped_by = "cancelled"
                    return
                if frame.index >= self._limits.frames:
                    self.stopped_by = f"the limit of {self._limits.frames} frames"
                    return
                result = session.step(prepared)
                masks, scores = result.masks.cpu().numpy(), result.scores.cpu().numpy()
                self._preview_file(frame.index).write_bytes(self._draw(frame, masks, scores))
                done = frame.index + 1
                rate = done / (time.perf_counter() - begun)
                self.progress = Progress(done, source.expected_frames, rate, session.unknown_words)
                self._changed.set()
                writer.write(frame, masks, scores)

    def _draw(self, frame: Frame, masks: np.ndarray, scores: np.ndarray) -> bytes:
        """The frame with its masks, as JPEG of at most `_PREVIEW_SIDE` pixels."""
        captions = [
            caption(text, score, bool(mask.any()), number)
            for number, (text, score, mask) in enumerate(
                zip(self.expressions, scores, masks, strict=True)
            )
        ]
        image, small = _shrink(frame.image, masks, _PREVIEW_SIDE)
        return encode_jpeg(draw_overlay(image, small, captions))


def first_frame(path: Path, root: Path, limits: Limits) -> tuple[bytes, str]:
    """The first frame of a visitor's clip as JPEG, and what the clip is in words. Raises UserError: the clip cannot be taken."""
    with open_upload(path, root, limits) as source:
        try:
            image = next(iter(source)).image
        except UserError as error:
            raise UserError(str(error).replace(str(path), path.name)) from error
        height, width = image.shape[:2]
        length = f", {source.expected_frames} frames" if source.expected_frames else ""
    small, _ = _shrink(image, np.zeros((0, height, width), bool), _PREVIEW_SIDE)
    return encode_jpeg(small), f"{path.name}: {width} x {height}{length}"


def _shrink(image: np.ndarray, masks: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Image ``(H, W, 3)`` and masks ``(E, H, W)`` with at most ``side`` pixels each way."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image, masks
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    picture = Image.fromarray(image).resize((columns, rows), reducing_gap=2.0)
    nearest = np.arange(rows) * height // rows, np.arange(columns) * width // columns
    return np.asarray(picture), masks[:, nearest[0]][:, :, nearest[1]]
