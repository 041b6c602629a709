"""Write masks, the overlay video and the result file of one run."""

import json
import os
import queue
import re
import shutil
import struct
import threading
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from refsam.errors import UserError
from refsam.video.frames import Frame
from refsam.video.overlay import caption, draw_overlay

_OUTPUTS = ("masks", "overlay.mp4", "result.json")  # the last one says that the others are in place
STAGING = ".refsam-unfinished"
_QUEUE_DEPTH = 4
# A fraction of the time of veryfast at CRF 20, and no larger error (docs/performance.md).
H264_OPTIONS: dict[str, object] = {
    "preset": "ultrafast",
    "crf": "22",
    "x264-params": "cabac=1:no-deblock=0",
}
_FINEST_TIME_BASE = Fraction(1, 90000)


class ResultWriter:
    """Write one run's outputs in a thread of its own, under a temporary name until `finish`.

    ``masks/<two-digit expression>/<five-digit frame>.png`` (0 and 255, at the frame's size),
    ``overlay.mp4`` (H.264 at the source's times) and ``result.json``. Leaving the ``with`` block without
    `finish` removes everything that was written.

    Args:
        out: folder to make; its missing parents are made too.
        expressions: what is segmented, in the order of the masks.
        fps: frame rate of the source.
        time_base: unit of the source's frame times.
        overlay: also write ``overlay.mp4``.
        overwrite: replace the outputs of an earlier run in ``out``; other files there are never touched.

    Raises:
        UserError: ``out`` exists, or cannot be written; from `write` and `finish` too, when the disk is full.
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
    ) -> None:
        self.out = Path(out)
        self._expressions = list(expressions)
        # Arrays: lists would hold an object for every number of a long video.
        self._scores = [array("d") for _ in expressions]
        self._areas = [array("q") for _ in expressions]
        self._times = array("d")
        self._fps = fps
        check_output(self.out, overwrite=overwrite)
        self._made = _make_folders(self.out)
        self._staging = self.out / STAGING
        shutil.rmtree(self._staging, ignore_errors=True)  # left by a run that was killed
        with _disk_errors(self.out):
            for index in range(len(expressions)):
                (self._staging / "masks" / f"{index:02d}").mkdir(parents=True)
        path = self._staging / "overlay.mp4"
        self._video = _OverlayVideo(path, fps, time_base) if overlay else None
        self._queue: queue.Queue[tuple[Frame, np.ndarray, np.ndarray] | None] = queue.Queue(
            _QUEUE_DEPTH
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="refsam-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._staging.exists():
            self._discard()

    @property
    def frames(self) -> int:
        """Number of frames that are written."""
        return len(self._times)

    def write(self, frame: Frame, masks: np.ndarray, scores: np.ndarray) -> None:
        """Queue one frame; waits where writing is slower than segmenting.

        Args:
            frame: the source's frame.
            masks: ``(E, H, W)`` bool.
            scores: ``(E,)`` in 0..1.
        """
        while self._error is None:
            try:
                return self._queue.put((frame, masks, scores), timeout=0.1)
            except queue.Full:
                continue
        raise self._error

    def finish(self, **facts: Any) -> Path:
        """Write what is queued, close the video, write ``result.json`` with ``facts`` and rename.

        Returns:
            The output folder.
        """
        self._stop()
        if self._error is not None:
            raise self._error
        with _disk_errors(self.out):
            if self._video is not None:
                self._video.close()
            text = _to_json(self._report(facts))
            (self._staging / "result.json").write_text(text, encoding="utf-8")
            _replace(self._staging, self.out)
        return self.out

    def _report(self, facts: dict[str, Any]) -> dict[str, Any]:
        expressions = zip(self._expressions, self._scores, self._areas, strict=True)
        return facts | {
            "frames": self.frames,
            "fps": float(self._fps),
            "times": [round(time, 6) for time in self._times],
            "expressions": [
                {"text": text, "scores": scores.tolist(), "areas": areas.tolist()}
                for text, scores, areas in expressions
            ],
        }

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    with _disk_errors(self.out):
                        self._write_frame(*item)
                except BaseException as error:  # raised again by the next write or by finish
                    self._error = error

    def _write_frame(self, frame: Frame, masks: np.ndarray, scores: np.ndarray) -> None:
        areas = np.count_nonzero(masks, axis=(1, 2))
        for index, mask in enumerate(masks):
            path = self._staging / "masks" / f"{index:02d}" / f"{frame.index:05d}.png"
            path.write_bytes(encode_mask(mask))
        if self._video is not None:
            captions = [
                caption(text, score, area > 0)
                for text, score, area in zip(self._expressions, scores, areas, strict=True)
            ]
            self._video.write(draw_overlay(frame.image, masks, captions), frame.time)
        self._times.append(frame.time)
        for index, (score, area) in enumerate(zip(scores, areas, strict=True)):
            self._scores[index].append(round(float(score), 4))
            self._areas[index].append(int(area))

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _discard(self) -> None:
        self._error = self._error or UserError("discarded")  # what is queued need not be written
        self._stop()
        if self._video is not None:
            self._video.abandon()
        shutil.rmtree(self._staging, ignore_errors=True)
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # somebody else put something there
                return


def check_output(out: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse an output folder before any work is done.

    Raises:
        UserError: it exists and ``overwrite`` is off, is a file, or cannot be written.
    """
    out = Path(out)
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} exists and is no folder: give a new folder with --out")
        if out.exists() and not overwrite:
            raise UserError(
                f"{out} exists: give a new folder with --out, or --overwrite to replace its results"
            )
        nearest = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
        writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}): give another folder with --out"
        ) from error
    if not writable:
        raise UserError(
            f"{out} cannot be written ({nearest} is not a writable folder): give another with --out"
        )


def encode_mask(mask: np.ndarray) -> bytes:
    """A ``(H, W)`` bool mask as an 8-bit grey PNG of 0 and 255.

    Made by hand: libraries try five filters on each row, which here are none the better for it. Run-length matching is
    what flat areas need: as fast as level 1 and smaller than level 6.
    """
    height, width = mask.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each row begins with its filter: none
    np.negative(mask.view(np.uint8), out=rows[:, 1:])
    compressor = zlib.compressobj(6, zlib.DEFLATED, strategy=zlib.Z_RLE)
    pixels = compressor.compress(rows.data) + compressor.flush()
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)


def _png_chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


class _OverlayVideo:
    """H.264 in mp4 with the source's frame times; opened by the first frame, whose size it keeps."""

    def __init__(self, path: Path, fps: Fraction, time_base: Fraction) -> None:
        self._path = path
        self._fps = fps
        self._time_base = time_base if time_base.denominator <= 90000 else _FINEST_TIME_BASE
        self._container: av.container.OutputContainer | None = None
        self._last = -1

    def write(self, image: np.ndarray, time: float) -> None:
        if self._container is None:
            self._open(*image.shape[:2])
        picture = av.VideoFrame.from_numpy_buffer(self._fit(image), format="rgb24")
        self._last = max(self._last + 1, round(time / self._time_base))
        picture.pts, picture.time_base = self._last, self._time_base
        self._mux(picture)

    def close(self) -> None:
        if self._container is not None:
            self._mux(None)
            self._container.close()

    def abandon(self) -> None:
        """Close without caring for the content, which is about to be removed."""
        try:
            self.close()
        except (OSError, av.FFmpegError):  # the full disk that made us give up
            return

    def _open(self, height: int, width: int) -> None:
        self._size = height + height % 2, width + width % 2  # 4:2:0 halves the colour planes
        self._container = av.open(
            str(self._path), "w", format="mp4", options={"movflags": "+faststart"}
        )
        rate = self._fps.limit_denominator(1001)
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.options = H264_OPTIONS
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = self._time_base

    def _fit(self, image: np.ndarray) -> np.ndarray:
        """The frame on the video's canvas: odd edges repeated, another size scaled to fit on black."""
        height, width = self._size
        if image.shape[:2] == self._size:
            return image
        rows, columns = height - image.shape[0], width - image.shape[1]
        if rows in (0, 1) and columns in (0, 1):
            return np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge")
        scale = min(height / image.shape[0], width / image.shape[1])
        size = max(1, int(image.shape[1] * scale)), max(1, int(image.shape[0] * scale))
        canvas = Image.new("RGB", (width, height))
        canvas.paste(
            Image.fromarray(image).resize(size), ((width - size[0]) // 2, (height - size[1]) // 2)
        )
        return np.asarray(canvas)

    def _mux(self, picture: av.VideoFrame | None) -> None:
        assert self._container is not None
        for packet in self._stream.encode(picture):
            self._container.mux(packet)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system says about a full or vanished disk into one line."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}): nothing was kept;"
            " free some space or give another folder with --out"
        ) from error


def _to_json(report: dict[str, Any]) -> str:
    """Indented JSON with each list of numbers on one line."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    return re.sub(r"\n *(?=[-\d\]])", " ", text)


def _make_folders(out: Path) -> list[Path]:
    """Make ``out`` and its missing parents; what was made, outermost first."""
    missing = [path for path in (out, *out.parents) if not path.exists()][::-1]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}): give another folder with --out"
        ) from error
    return missing


def _replace(staging: Path, out: Path) -> None:
    """Move the outputs from the staging folder into place, aside with those of an earlier run."""
    old = staging / "old"
    old.mkdir()
    for name in reversed(_OUTPUTS):
        if (out / name).exists():
            (out / name).rename(old / name)
    for name in _OUTPUTS:
        if (staging / name).exists():
            (staging / name).rename(out / name)
    shutil.rmtree(staging)
