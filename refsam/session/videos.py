"""Segments many videos: several at a time, in several processes, and continues after a kill."""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refsam import renamed
from refsam.errors import UserError
from refsam.runtime.files import BusyError
from refsam.runtime.shard import Shard
from refsam.session.cuda_graphs import FrameGraphs
from refsam.session.preparation import EncodedFrame, PreparedFrame
from refsam.session.streaming import prefetch_frames
from refsam.session.video_folders import Source, VideoJob, assign_folders, finished, make_jobs
from refsam.session.video_session import FrameResult, VideoSession, step_batch

if TYPE_CHECKING:
    from refsam.model import PromptedSAM
    from refsam.video import Frame, FrameSource, ReadOptions, ResultWriter


@dataclass(frozen=True)
class VideoOptions:
    """Options for reading videos and writing their masks.

    Attributes:
        reading: range of frames and time limits; None reads all.
        formats: of `refsam.video.mask_formats.FORMATS`.
        threshold: pixels with a higher probability than this belong to a mask.
    """

    reading: "ReadOptions | None" = None
    formats: Sequence[str] = ("png",)
    threshold: float = 0.5

    def facts(self) -> dict[str, Any]:
        """Entries of ``result.json`` for values other than the defaults."""
        facts: dict[str, Any] = {}
        if self.threshold != 0.5:
            facts["threshold"] = self.threshold
        if self.reading is not None and (selection := self.reading.selection()):
            facts["selection"] = selection
        return facts


EVERYTHING = VideoOptions()


@dataclass(frozen=True)
class VideoOutcome:
    """The outcome of a video.

    Attributes:
        source: the video.
        folder: where its results are, or would be.
        frames: number of frames with results; 0 if there are none.
        problem: the error in one line; None if everything was done.
        was_done: an earlier run did it.
        is_busy: another process is doing it.
    """

    source: str
    folder: Path
    frames: int
    problem: str | None = None
    was_done: bool = False
    is_busy: bool = False


@renamed.arguments
def segment_videos(
    model: "PromptedSAM",
    videos: Sequence[Source],
    expressions: Sequence[str] | Sequence[Sequence[str]],
    out: Source,
    *,
    batch_size: int = 1,
    overlay: bool = True,
    options: VideoOptions = EVERYTHING,
    shard: Shard | None = None,
    graphs: FrameGraphs | None = None,
    settings: Mapping[str, Any] | None = None,
    advance: Callable[[VideoOutcome], None] = lambda _: None,
    heed: Callable[[], None] = lambda: None,
) -> list[VideoOutcome]:
    """Segment videos into folders ``out/<the video's name>``, each as `refsam segment` writes it.

    Videos that an earlier run finished are skipped, so a killed run continues. A video that cannot be
    read, or not to its end, does not stop the others, and is tried again by the next run.

    Args:
        model: a `RefSAM` or `EVFSAM` in evaluation mode.
        videos: anything that `refsam.video.open_source` takes. The second of the same name gets ``-2`` appended;
            ``out/videos.json`` maps videos to folders.
        expressions: what to segment: in all videos, or a list for each video.
        out: folder to make, or that of an earlier run.
        batch_size: frames per pass of the image encoder, from as many videos. 1 has the lowest latency; larger values
            use a GPU better. Logits are the same within 1e-5.
        overlay: also write ``overlay.mp4``.
        options: range of frames, formats of masks, threshold.
        shard: this process's part of the videos; None: as `torchrun` sets it.
        graphs: as for `VideoSession`.
        settings: more entries for ``result.json``, such as the model's name; an earlier run's must be equal.
        advance: called with each outcome.
        heed: called between batches and while waiting for a frame; an exception that it raises ends the run and
            removes unfinished videos.

    Returns:
        The outcomes of this process's videos: first those that were already done, then the others as they ended.

    Raises:
        UserError: an expression cannot be used, `out` holds results of other settings, or cannot be written.
        ValueError: arguments that do not fit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, want at least 1")
    pairs = make_jobs(videos, expressions)
    for texts in dict.fromkeys(texts for _, texts in pairs):
        VideoSession(model, texts)  # refuses what cannot be used before anything is done
    settings = dict(settings or {}) | options.facts()
    jobs = assign_folders(pairs, Path(out))
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
                session = VideoSession(
                    model, waiting[0].expressions, graphs=graphs, threshold=options.threshold
                )
                stream = _VideoStream(waiting.popleft(), session, options, heed)
                streams.append(stack.enter_context(closing(stream)))
                stream.start(settings, overlay=overlay, alone=batch_size == 1)
            _advance(streams, batch_size)
            heed()
            for stream in [stream for stream in streams if stream.has_ended]:
                streams.remove(stream)
                outcomes.append(stream.finish(settings))
                advance(outcomes[-1])
    return outcomes


class _VideoStream:
    """A video in progress: its reader, session and writer. `problem` is the error that ended it early."""

    def __init__(
        self,
        job: VideoJob,
        session: VideoSession,
        options: VideoOptions,
        heed: Callable[[], None],
    ) -> None:
        self.job, self.session = job, session
        self.has_ended = False
        self.problem: UserError | None = None
        self._options, self._heed = options, heed
        self._started = time.perf_counter()
        self._outcome: VideoOutcome | None = None
        self._reader: FrameSource | None = None
        self._writer: ResultWriter | None = None
        self._open = ExitStack()
        self._frames: Generator[tuple[Frame, PreparedFrame | EncodedFrame], None, None]

    def start(self, settings: dict[str, Any], *, overlay: bool, alone: bool) -> None:
        """Open the source and the folder; an error ends the video at once."""
        try:
            self._open_all(overlay, alone)
        except BusyError:
            self._outcome = VideoOutcome(self.job.source, self.job.folder, 0, is_busy=True)
        except UserError as error:
            self.problem = error
        else:
            # Another process may have finished this video since the list of jobs was made.
            self._outcome = _earlier(self.job, settings, tidy=False)
        self.has_ended = self.problem is not None or self._outcome is not None

    def _open_all(self, overlay: bool, alone: bool) -> None:
        from refsam.video import ReadOptions, ResultWriter, open_source
        from refsam.video.run_folder import check_output

        check_output(self.job.folder, overwrite=True, source=self.job.source)
        reading = self._options.reading or ReadOptions()
        self._reader = self._open.enter_context(open_source(self.job.source, reading))
        writer = ResultWriter(
            self.job.folder,
            self.job.expressions,
            fps=self._reader.fps,
            time_base=self._reader.time_base,
            overlay=overlay,
            overwrite=True,  # of a run that was killed, or ended early
            formats=self._options.formats,
            sound=self._reader.sound,
        )
        self._writer = self._open.enter_context(writer)
        frames = prefetch_frames(self.session, self._reader, encode=alone, heed=self._heed)
        self._frames = self._open.enter_context(closing(frames))

    def take(self, count: int) -> list[tuple["Frame", PreparedFrame | EncodedFrame]]:
        """The next frames; fewer at the end of the video, then none."""
        taken: list[tuple[Frame, PreparedFrame | EncodedFrame]] = []
        try:
            taken.extend(islice(self._frames, count))
        except UserError as error:
            self.problem = error
        self.has_ended = len(taken) < count
        return taken

    def write(self, frame: "Frame", result: FrameResult) -> None:
        """Queue a result; a full disk ends the video."""
        assert self._writer is not None
        try:
            self._writer.write(frame, *result.on_host())
        except UserError as error:
            self.problem, self.has_ended = error, True

    def finish(self, settings: dict[str, Any]) -> VideoOutcome:
        """Put the results in place if there are any."""
        if self._outcome is None:
            self._outcome = self._finished(settings)
        self.close()
        return self._outcome

    def _finished(self, settings: dict[str, Any]) -> VideoOutcome:
        frames = self.session.frame_index
        if self._writer is not None and self._reader is not None and frames:
            seconds = time.perf_counter() - self._started
            from refsam.video.frames import source_facts

            try:
                self._writer.finish(
                    **settings,
                    **source_facts(self._reader),
                    source=self.job.source,
                    complete=self.problem is None,
                    stopped_by=None if self.problem is None else str(self.problem),
                    device=str(self.session.model.device),
                    timings={"seconds": round(seconds, 3)},
                )
            except UserError as error:
                self.problem = error
            frames = self._writer.frames
        problem = None if self.problem is None else str(self.problem)
        if not frames and problem is None:
            problem = f"{self.job.source} has no frame in the chosen range"
        return VideoOutcome(self.job.source, self.job.folder, frames, problem)

    def close(self) -> None:
        """Stop reading and writing; remove unfinished results."""
        self._open.close()


def _advance(streams: list[_VideoStream], batch_size: int) -> None:
    """Segment one batch, with an equal number of frames of each video."""
    running = [stream for stream in streams if not stream.has_ended]
    if not running:
        return
    taken = [
        (stream, *pair) for stream in running for pair in stream.take(batch_size // len(running))
    ]
    results = step_batch([(stream.session, prepared) for stream, _, prepared in taken])
    for (stream, frame, _), result in zip(taken, results, strict=True):
        stream.write(frame, result)


def _size(source: str) -> float:
    """Bytes of a file, as a measure of the work; 0 for other sources."""
    try:
        return os.path.getsize(source)
    except OSError:
        return 0.0


def _earlier(job: VideoJob, settings: dict[str, Any], *, tidy: bool = True) -> VideoOutcome | None:
    """The outcome of an earlier run that finished this job; raises UserError if its settings were others."""
    frames = finished(job, settings, tidy=tidy)
    if frames is None:
        return None
    return VideoOutcome(job.source, job.folder, frames, was_done=True)
