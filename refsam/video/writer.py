"""Write masks, the overlay video and the result file of one run."""

import errno
import json
import os
import queue
import re
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from refsam.errors import UserError
from refsam.runtime.signals import postponed
from refsam.video.captions import caption
from refsam.video.frames import Frame
from refsam.video.mask_formats import check_formats, files_of, mask_format
from refsam.video.overlay import draw_overlay
from refsam.video.overlay_video import OverlayVideo
from refsam.video.run_folder import RESULT, RESUME, RunFolder

_QUEUE_DEPTH = 4
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RESERVE = 2**18  # bytes kept free for the end of a run on a full disk, and more for every frame
_RESERVE_PER_FRAME = 64


class DiskFullError(UserError):
    """No more can be written; the frames before are good and kept."""


class ResultWriter:
    """Writes a run's outputs in a background thread, under a hidden name until `finish`.

    ``masks/<expression>/<frame>.png`` (0 and 255, at the frame's size; other formats elsewhere), ``overlay.mp4`` (H.264 at
    the source's times) and ``result.json``. Leaving the ``with`` block without `finish` removes everything that was written.

    Args:
        out: folder to make; its missing parents are made too. It may be there if it is empty.
        expressions: the referring expressions, in the order of the masks.
        fps: frame rate of the source.
        time_base: unit of the source's frame times.
        overlay: also write ``overlay.mp4``.
        overwrite: replace the files that an earlier run recorded in ``out``; others are never touched.
        formats: how masks are kept, of `refsam.video.mask_formats.FORMATS`.
        sound: file whose sound the overlay gets, and the seconds in it at which the source's frames begin.
        resume: add to what an earlier run wrote into ``out``.

    Raises:
        UserError: ``out`` holds something else, or cannot be written; `BusyError` if another process writes into it.
            `write` and `finish` raise `DiskFullError`.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        expressions: Sequence[str],
        *,
        fps: Fraction,
        time_base: Fraction,
        overlay: bool = True,
        overwrite: bool = False,
        formats: Sequence[str] = ("png",),
        sound: tuple[str, float] | None = None,
        resume: bool = False,
    ) -> None:
        check_formats(formats, len(expressions))
        self.out = Path(out)
        self._expressions, self._formats, self._fps = list(expressions), list(formats), fps
        # Arrays: lists would hold an object for every number of a long video.
        self._scores = [array("d") for _ in expressions]
        self._areas = [array("q") for _ in expressions]
        self._times, self._numbers = array("d"), array("q")
        self._notes: list[str] = []
        self._state: Any = None
        self._folder = RunFolder(self.out, overwrite=overwrite, resume=resume)
        self._error: BaseException | None = None
        self._reserved = 0
        try:
            with self._disk_errors():
                self._reserve(_RESERVE)
                self._kept = [
                    mask_format(name, self._folder.new, len(expressions)) for name in formats
                ]
                path = self._folder.new / "overlay.mp4"
                self._video = OverlayVideo(path, fps, time_base, sound) if overlay else None
                if self._folder.earlier is not None:
                    self._take_over(self._folder.earlier)
        except BaseException:
            self._folder.discard()
            raise
        self._queue: queue.Queue[tuple[Frame, np.ndarray, np.ndarray, Any] | None] = queue.Queue(
            _QUEUE_DEPTH
        )
        self._thread = threading.Thread(target=self._work, name="refsam-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._folder.is_open:
            with postponed():
                self._discard()

    @property
    def frames(self) -> int:
        """Number of frames that are written."""
        return len(self._times)

    def write(self, frame: Frame, masks: np.ndarray, scores: np.ndarray, state: Any = None) -> None:
        """Queue one frame; waits if writing is slower than segmenting.

        Args:
            frame: the source's frame.
            masks: ``(E, H, W)`` bool.
            scores: ``(E,)`` in 0..1.
            state: the session's state after the frame; the last one is kept for a run that resumes.

        Raises:
            DiskFullError: the disk is full; `finish` keeps the frames before.
        """
        while self._error is None:
            try:
                return self._queue.put((frame, masks, scores, state), timeout=0.1)
            except queue.Full:
                continue
        raise self._error

    def finish(self, *, pack: Callable[[Any], bytes] | None = None, **facts: Any) -> Path:
        """Write queued frames, close the video, write ``result.json`` with ``facts`` and move everything into place.

        Signals that would end the process are postponed until that is done.

        Args:
            pack: makes bytes of the last frame's state, for a run that is not complete.
            facts: further entries of ``result.json``.

        Returns:
            The output folder.

        Raises:
            DiskFullError: the disk was full; the frames before it are in place.
        """
        with postponed():
            self._stop()
            is_full = isinstance(self._error, DiskFullError) and self.frames > 0
            if self._error is not None and not is_full:
                raise self._error
            self._reserve(0)
            with self._disk_errors():
                self._close_video(is_full)
                if is_full:
                    facts |= {"complete": False, "stopped_by": str(self._error)}
                report = self._report(facts)
                for kept in self._kept:
                    kept.finish(report)
                text = _to_json(report)
                # A lone surrogate, from a name that is not UTF-8, becomes JSON's own escape for it.
                (self._folder.new / RESULT).write_bytes(text.encode("utf-8", "backslashreplace"))
                if pack is not None and not facts.get("complete", True):
                    (self._folder.new / RESUME).write_bytes(pack(self._state))
                self._folder.commit(self._widened())
        if is_full:
            raise self._error or AssertionError
        return self.out

    def _report(self, facts: dict[str, Any]) -> dict[str, Any]:
        expressions = zip(self._expressions, self._scores, self._areas, strict=True)
        notes = [*facts.pop("notes", ()), *self._notes]
        return facts | {
            "notes": list(dict.fromkeys(notes)),
            "formats": self._formats,
            "frames": self.frames,
            "fps": float(self._fps),
            "frame_numbers": self._numbers.tolist(),
            "times": [round(time, 6) for time in self._times],
            "expressions": [
                {"text": text, "scores": scores.tolist(), "areas": areas.tolist()}
                for text, scores, areas in expressions
            ],
        }

    def _take_over(self, earlier: dict[str, Any]) -> None:
        """Begin with the frames of an earlier run."""
        self._numbers.extend(earlier["frame_numbers"])
        self._times.extend(earlier["times"])
        self._notes.extend(earlier["notes"])
        rows = zip(self._scores, self._areas, earlier["expressions"], strict=True)
        for scores, areas, expression in rows:
            scores.extend(expression["scores"])
            areas.extend(expression["areas"])
        for kept in self._kept:
            kept.take_over(self.out)
        overlay = self.out / "overlay.mp4"
        if self._video is not None and overlay.exists() and self._times:
            self._video.go_on(overlay, self._times[0])

    def _widened(self) -> dict[str, str]:
        """Files of the earlier run whose numbers need more digits now."""
        if self._folder.earlier is None:
            return {}
        names = list(files_of(self._folder.earlier))
        numbers = self._numbers.tolist()
        report = {"formats": self._formats, "expressions": self._expressions}
        count = len(self._folder.earlier["frame_numbers"])
        wide = files_of(report | {"frame_numbers": numbers, "frames": len(numbers)}, first=count)
        return {old: new for old, new in zip(names, wide, strict=True) if old != new}

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    with self._disk_errors():
                        self._write_frame(*item)
                except BaseException as error:  # raised again by the next write or by finish
                    self._error = error

    def _write_frame(self, frame: Frame, masks: np.ndarray, scores: np.ndarray, state: Any) -> None:
        areas = np.count_nonzero(masks, axis=(1, 2))
        try:
            for kept in self._kept:
                kept.write(frame.index, frame.image, masks)
            if self._video is not None:
                rows = enumerate(zip(self._expressions, scores, areas, strict=True))
                captions = [caption(text, score, area > 0, n) for n, (text, score, area) in rows]
                self._video.write(draw_overlay(frame.image, masks, captions), frame)
            self._reserve(_RESERVE + _RESERVE_PER_FRAME * (1 + len(areas)) * self.frames)
        except OSError:
            for kept in self._kept:
                kept.take_back(frame.index)
            raise
        self._times.append(frame.time)
        self._numbers.append(frame.index)
        for index, (score, area) in enumerate(zip(scores, areas, strict=True)):
            self._scores[index].append(round(float(score), 4))
            self._areas[index].append(int(area))
        self._state = state

    def _reserve(self, size: int) -> None:
        """Reserve this many bytes for the end of the run, in steps; 0 releases all of them."""
        path = self._folder.staging / "reserve"
        if not size:
            path.unlink(missing_ok=True)
        elif size - self._reserved >= _RESERVE:
            with path.open("ab") as file:
                file.write(bytes(_RESERVE))
            self._reserved += _RESERVE

    def _close_video(self, is_full: bool) -> None:
        if self._video is None:
            return
        try:
            self._video.close()
        except (OSError, av.FFmpegError):
            if not is_full:
                raise
            (self._folder.new / "overlay.mp4").unlink(missing_ok=True)
            self._notes.append("the disk had no room for the overlay")
        if self._video.problem is not None:
            self._notes.append(self._video.problem)

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _discard(self) -> None:
        self._error = self._error or UserError("discarded")  # queued frames need not be written
        self._stop()
        if self._video is not None:
            self._video.abandon()
        self._folder.discard()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn the operating system's errors about a full or vanished disk into one line."""
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            words = error.strerror or error
            advice = "free some space or give another folder with --out"
            if error.errno not in _FULL:
                raise UserError(f"{self.out} cannot be written ({words}): {advice}") from error
            kept = (
                f"the {self.frames} frames before are kept" if self.frames else "nothing was kept"
            )
            problem = f"cannot be written ({words}): {kept}; {advice}"
            raise DiskFullError(f"{self.out} {problem}") from error


def _to_json(report: dict[str, Any]) -> str:
    """Indented JSON with each list of numbers on one line."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    return re.sub(r"\n *(?=[-\d\]])", " ", text)
