"""The loop of ``refsam segment`` and ``refsam demo``: frame by frame to the writer, until the clip ends or something stops it."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from refsam.errors import UserError
from refsam.runtime.device import autocast
from refsam.runtime.signals import Terminated

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

    from refsam.session import EncodedFrame, PreparedFrame, VideoSession
    from refsam.video import Frame, ResultWriter


@dataclass
class Run:
    """Outcome of a run: seconds, frames, and the error that ended it early."""

    frames: int = 0
    seconds_to_first_mask: float | None = None
    seconds: float = 0.0
    seconds_of_frames: float = 0.0
    seconds_in_model: float = 0.0
    stopped_by: UserError | KeyboardInterrupt | None = None

    @property
    def rate(self) -> float:
        """Frames per second from the first frame on: without imports and loading."""
        return self.frames / self.seconds_of_frames

    def facts(self) -> dict[str, Any]:
        """The run's entries in ``result.json``."""
        words = None if self.stopped_by is None else str(self.stopped_by) or "interrupted"
        return {
            "complete": self.stopped_by is None,
            "stopped_by": words,
            "timings": {
                "seconds": round(self.seconds, 3),
                "seconds_to_first_mask": round(self.seconds_to_first_mask or 0.0, 3),
                "seconds_in_model": round(self.seconds_in_model, 3),
                "frames_per_second": round(self.rate, 2),
            },
        }

    def report(self, out: Path, say: Callable[[str], None]) -> None:
        """Say the outcome; raise what ended the run early."""
        if isinstance(self.stopped_by, KeyboardInterrupt):
            words = str(self.stopped_by) or "interrupted"
            typer.echo(
                f"refsam: {words}; the {self.frames} frames done until then are in {out}; --resume goes on",
                err=True,
            )
            raise typer.Exit(exit_code(self.stopped_by))
        if self.stopped_by is not None:
            raise UserError(f"{self.stopped_by}; the {self.frames} frames before it are in {out}")
        say(f"{self.frames} frames in {self.seconds:.1f} s: {out}")
        say(f"{self.rate:.1f} frames/s once the model was loaded, reading and writing included")


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The shells' exit code: 128 plus the number of the signal."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else 2)


def segment_frames(
    session: "VideoSession",
    frames: Iterable[tuple["Frame", "PreparedFrame | EncodedFrame"]],
    writer: "ResultWriter",
    precision: "torch.dtype",
    *,
    started: float,
    advance: Callable[[], None],
    heed: Callable[[], None],
    tell: Callable[["Frame", "np.ndarray", "np.ndarray"], None] | None = None,
) -> Run:
    """Step through the frames and queue the results, until the end, a bad frame, a full disk or Ctrl-C.

    Args:
        frames: as `prefetch_frames` gives them.
        started: `time.perf_counter` when the command began.
        advance: called after each frame.
        heed: called between frames; raises an interrupt that has come.
        tell: called with each frame, its masks and its scores.

    Raises:
        UserError: nothing could be done at all, or the results cannot be written.
    """
    from refsam.session import EncodedFrame
    from refsam.video import FrameDecodeError
    from refsam.video.writer import DiskFullError

    run, first = Run(), time.perf_counter()
    try:
        with autocast(session.model.device, precision):
            for frame, prepared in frames:
                begun = time.perf_counter()
                masks, scores = session.step(prepared).on_host()
                now = time.perf_counter()
                run.seconds_in_model += now - begun
                if isinstance(prepared, EncodedFrame):
                    run.seconds_in_model += prepared.seconds
                if run.seconds_to_first_mask is None:
                    run.seconds_to_first_mask = now - started
                writer.write(frame, masks, scores, session.state)
                run.frames += 1
                if tell is not None:
                    tell(frame, masks, scores)
                advance()
                heed()
    except (FrameDecodeError, KeyboardInterrupt, DiskFullError, LostReaderError) as error:
        if run.frames == 0:
            raise
        run.stopped_by = error
    ended = time.perf_counter()
    run.seconds, run.seconds_of_frames = ended - started, ended - first
    return run


class LostReaderError(UserError):
    """Nobody reads the lines of ``--json`` any more."""


class JsonLines:
    """One JSON object per frame, written as soon as it is done.

    Args:
        file: where to.
        texts: the expressions.
        files: the source's files, by number of the frame, if it is a folder.
        with_masks: also write COCO's run lengths.
    """

    def __init__(
        self, file: TextIO, texts: Sequence[str], files: Sequence[str] | None, *, with_masks: bool
    ) -> None:
        self._file, self._texts, self._files, self._with_masks = file, texts, files, with_masks

    def __call__(self, frame: "Frame", masks: "np.ndarray", scores: "np.ndarray") -> None:
        """Write a frame's line. Raises LostReaderError: the other end of the pipe was closed."""
        line: dict[str, object] = {"frame": frame.index, "time": round(frame.time, 6)}
        if self._files is not None:
            line["file"] = self._files[frame.index]
        found = zip(self._texts, masks, scores, strict=True)
        line["expressions"] = [self._object(*one) for one in found]
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except BrokenPipeError:
            # Otherwise Python reports at exit that it cannot write the rest.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            raise LostReaderError("nobody reads the lines of --json any more") from None

    def _object(self, text: str, mask: "np.ndarray", score: float) -> dict[str, Any]:
        from refsam.video.mask_formats import encode_run_lengths
        from refsam.video.overlay import bounding_box

        box = bounding_box(mask, 0)
        sides = None if box is None else [box[1].start, box[0].start, box[1].stop, box[0].stop]
        entry = {
            "text": text,
            "score": round(float(score), 4),
            "area": int(mask.sum()),
            "box": sides,
        }
        return entry | {"segmentation": encode_run_lengths(mask)} if self._with_masks else entry


@contextmanager
def json_lines(
    target: str | None, texts: Sequence[str], files: Sequence[str] | None, *, with_masks: bool
) -> "Iterator[JsonLines | None]":
    """A writer of lines to standard output (``-``) or a new file; None if no lines are wanted.

    Raises UserError: the file cannot be written.
    """
    if target is None:
        yield None
    elif target == "-":
        yield JsonLines(sys.stdout, texts, files, with_masks=with_masks)
    else:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(Path(target).open("w", encoding="ascii"))
            except OSError as error:
                raise UserError(f"--json {target}: cannot be written ({error.strerror})") from error
            yield JsonLines(file, texts, files, with_masks=with_masks)
