"""Segment many videos: frames of several at a time, shared between processes, continued after a kill."""

import json
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refsam import renamed
from refsam.errors import UserError
from refsam.runtime.shard import Shard
from refsam.session.graphs import FrameGraphs
from refsam.session.preparation import EncodedFrame, PreparedFrame
from refsam.session.streaming import prefetch_frames
from refsam.session.video_session import FrameResult, VideoSession, step_batch

if TYPE_CHECKING:
    from refsam.model import PromptedSAM
    from refsam.video import Frame, ResultWriter

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class VideoOutcome:
    """The outcome of a video.

    Attributes:
        source: the video.
        folder: where its results are, or would be.
        frames: how many are there; 0 if there are no results.
        problem: what was wrong, in one line; None if everything was done.
        was_done: an earlier run did it.
    """

    source: str
    folder: Path
    frames: int
    problem: str | None = None
    was_done: bool = False


@renamed.arguments
def segment_videos(
    model: "PromptedSAM",
    videos: Sequence[Source],
    expressions: Sequence[str] | Sequence[Sequence[str]],
    out: Source,
    *,
    batch_size: int = 1,
    overlay: bool = True,
    shard: Shard | None = None,
    graphs: FrameGraphs | None = None,
    settings: Mapping[str, Any] | None = None,
    advance: Callable[[VideoOutcome], None] = lambda _: None,
) -> list[VideoOutcome]:
    """Segment videos into folders ``out/<the video's name>``, each as `refsam segment` writes it.

    Videos that an earlier run finished are skipped, so a killed run continues. A video that cannot be
    read, or not to its end, does not stop the others, and is tried again by the next run.

    Args:
        model: a `RefSAM` or `EVFSAM` in evaluation mode.
        videos: whatever `refsam.video.open_source` takes. Of the same names, the second gets ``-2`` behind it.
        expressions: what to segment: in all videos, or a list for each video.
        out: folder to make, or that of an earlier run.
        batch_size: frames that go through the image encoder together, from that many videos while there are as
            many. 1 answers soonest; more serve a GPU better. Logits are the same within 1e-5.
        overlay: also write ``overlay.mp4``.
        shard: which of the videos this process does; as `torchrun` says where None.
        graphs: as for `VideoSession`.
        settings: more entries for ``result.json``, such as the model's name; an earlier run's must be equal.
        advance: called with each outcome.

    Returns:
        The outcomes of this process's videos: those that were done, then the others as they ended.

    Raises:
        UserError: an expression cannot be used, `out` holds results of other settings, or cannot be written.
        ValueError: arguments that do not fit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, want at least 1")
    jobs = _jobs(videos, expressions, Path(out))
    for texts in dict.fromkeys(job.expressions for job in jobs):
        VideoSession(model, texts)  # refuses what cannot be used before anything is done
    settings = dict(settings or {})
    own = (shard or Shard.from_environment()).of(jobs, lambda job: _size(job.source))
    outcomes = [found for job in own if (found := _earlier(job, settings))]
    for outcome in outcomes:
        advance(outcome)
    done = {outcome.folder for outcome in outcomes}
    waiting = deque(job for job in own if job.folder not in done)
    streams: list[_VideoStream] = []
    with ExitStack() as stack:
        while waiting or streams:
            while waiting and len(streams) < batch_size:
                job = waiting.popleft()
                session = VideoSession(model, job.expressions, graphs=graphs)
                stream = _VideoStream(job, session, overlay, alone=batch_size == 1)
                streams.append(stack.enter_context(closing(stream)))
            _advance(streams, batch_size)
            for stream in [stream for stream in streams if stream.has_ended]:
                streams.remove(stream)
                outcomes.append(stream.finish(settings))
                advance(outcomes[-1])
    return outcomes


@dataclass(frozen=True)
class _Job:
    source: str
    expressions: tuple[str, ...]
    folder: Path


class _VideoStream:
    """A video under way: its reader, session and writer. `problem` is what ended it early."""

    def __init__(self, job: _Job, session: VideoSession, overlay: bool, alone: bool) -> None:
        self.job, self.session = job, session
        self.has_ended = False
        self.problem: UserError | None = None
        self._started = time.perf_counter()
        self._writer: ResultWriter | None = None
        self._open = ExitStack()
        self._frames: Generator[tuple[Frame, PreparedFrame | EncodedFrame], None, None]
        self._start(overlay, alone)

    def _start(self, overlay: bool, alone: bool) -> None:
        from refsam.video import ResultWriter, open_source

        try:
            reader = self._open.enter_context(open_source(self.job.source))
        except UserError as error:
            self.problem, self.has_ended = error, True
            return
        frames = prefetch_frames(self.session, reader, encode=alone)
        self._frames = self._open.enter_context(closing(frames))
        writer = ResultWriter(
            self.job.folder,
            self.job.expressions,
            fps=reader.fps,
            time_base=reader.time_base,
            overlay=overlay,
            overwrite=True,  # of a run that was killed, or ended early
        )
        self._writer = self._open.enter_context(writer)

    def take(self, count: int) -> list[tuple["Frame", PreparedFrame | EncodedFrame]]:
        """The next frames, fewer at the end of the video and none behind it."""
        taken: list[tuple[Frame, PreparedFrame | EncodedFrame]] = []
        try:
            taken.extend(islice(self._frames, count))
        except UserError as error:
            self.problem = error
        self.has_ended = len(taken) < count
        return taken

    def write(self, frame: "Frame", result: FrameResult) -> None:
        """Queue a result."""
        assert self._writer is not None
        self._writer.write(frame, *result.on_host())

    def finish(self, settings: dict[str, Any]) -> VideoOutcome:
        """Put the results in place if there are any."""
        problem = None if self.problem is None else str(self.problem)
        frames = self.session.frame_index
        if self._writer is not None and frames:
            seconds = time.perf_counter() - self._started
            self._writer.finish(
                **settings,
                source=self.job.source,
                complete=problem is None,
                stopped_by=problem,
                device=str(self.session.model.device),
                timings={"seconds": round(seconds, 3)},
            )
        self.close()
        return VideoOutcome(self.job.source, self.job.folder, frames, problem)

    def close(self) -> None:
        """Stop reading and writing; what is not finished is removed."""
        self._open.close()


def _advance(streams: list[_VideoStream], batch_size: int) -> None:
    """One batch: as many frames of each video as there is room for."""
    running = [stream for stream in streams if not stream.has_ended]
    if not running:
        return
    taken = [
        (stream, *pair) for stream in running for pair in stream.take(batch_size // len(running))
    ]
    results = step_batch([(stream.session, prepared) for stream, _, prepared in taken])
    for (stream, frame, _), result in zip(taken, results, strict=True):
        stream.write(frame, result)


def _jobs(
    videos: Sequence[Source], expressions: Sequence[str] | Sequence[Sequence[str]], out: Path
) -> list[_Job]:
    sources = [os.fspath(video) for video in videos]
    if isinstance(expressions, str) or not expressions:
        raise ValueError(f"expressions: got {expressions!r}, want a list of strings")
    if all(isinstance(texts, str) for texts in expressions):
        lists = [tuple(map(str, expressions))] * len(sources)
    else:
        lists = [tuple(texts) for texts in expressions]
    if len(lists) != len(sources):
        raise ValueError(
            f"expressions: got {len(lists)} lists, want {len(sources)}, one for each video"
        )
    seen: Counter[str] = Counter()
    jobs = []
    for source, texts in zip(sources, lists, strict=True):
        name = re.sub(r"[^\w.-]+", "-", Path(source).stem).lstrip(".") or "video"
        seen[name] += 1
        folder = out / (name if seen[name] == 1 else f"{name}-{seen[name]}")
        jobs.append(_Job(source, texts, folder))
    return jobs


def _size(source: str) -> float:
    """Bytes of a file, a measure of the work; 0 for what is no file."""
    try:
        return os.path.getsize(source)
    except OSError:
        return 0.0


def _earlier(job: _Job, settings: dict[str, Any]) -> VideoOutcome | None:
    """The outcome of an earlier run that did this to its end; raises UserError if it did something else."""
    from refsam.video.writer import STAGING

    file = job.folder / "result.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        found = {"text": [expression["text"] for expression in report["expressions"]]}
        found |= {key: report.get(key) for key in (*settings, "source")}
        complete, frames = report["complete"], report["frames"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no result of refsam: give another folder with --out") from error
    wanted = {"text": [*job.expressions], "source": job.source, **settings}
    different = [
        f"{key} was {found[key]!r}, now {wanted[key]!r}"
        for key in wanted
        if found[key] != wanted[key]
    ]
    if different:
        raise UserError(
            f"{job.folder} holds results of other settings: {'; '.join(different)}; give another folder with --out"
        )
    if not complete:
        return None
    shutil.rmtree(job.folder / STAGING, ignore_errors=True)  # of a run killed in its last moment
    return VideoOutcome(job.source, job.folder, frames, was_done=True)
