"""Score any model's masks on disk against the truth: J, F and J&F under a protocol."""

import multiprocessing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refsam.errors import UserError
from refsam.evaluation.scoring.clips import Clip, Layout, RunLengths, Truth, find_clips
from refsam.evaluation.scoring.problems import MaskProblemsError, Problem
from refsam.evaluation.scoring.protocols import Protocol, find_protocol
from refsam.evaluation.scoring.results import MaskEvaluation, ObjectScores
from refsam.images import IMAGE_ERRORS
from refsam.metrics import label_scores, sequence_scores
from refsam.runtime.malloc import keep_freed_memory

VOID = 255
_NOBODY = -1  # an object number that no pixel holds: the prediction of nothing

Map = NDArray[np.uint8]
Job = tuple[Clip, Protocol, bool, bool]


def evaluate_masks(
    predictions: Path,
    truth: Path,
    protocol: str = "davis-unsupervised",
    *,
    videos: Collection[str] | None = None,
    expressions: Path | None = None,
    missing: str = "error",
    processes: int = 1,
) -> MaskEvaluation:
    """Score a folder of PNGs against the truth: `find_clips`, then `score_layout`.

    Raises UserError as these do, and for an unknown protocol.
    """
    rules = find_protocol(protocol)
    layout = find_clips(predictions, truth, rules, videos=videos, expressions=expressions)
    return score_layout(layout, rules, missing=missing, processes=processes)


def score_layout(
    layout: Layout,
    protocol: Protocol,
    *,
    missing: str = "error",
    processes: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> MaskEvaluation:
    """Score all clips of a layout, which `processes` share without any effect on the result.

    With `missing="error"` anything wrong raises MaskProblemsError with the full list of it; with `"zero"`, what cannot be used
    is scored as empty and listed in the result. `advance` is called after every clip.
    Raises UserError for impossible arguments and for a truth that cannot be used.
    """
    if missing not in ("error", "zero"):
        raise UserError(f"missing: got {missing!r}, want error or zero")
    if processes < 1:
        raise UserError(f"processes: got {processes}, want at least 1")
    lenient = missing == "zero"
    # Files are read even if the folders are wrong already, so that the list of problems is complete.
    jobs = [(clip, protocol, lenient, lenient or not layout.problems) for clip in layout.clips]
    results = _in_order(jobs, processes, advance)
    problems = [*layout.problems, *(problem for result in results for problem in result.problems)]
    if any(problem.in_truth or not lenient for problem in problems):
        raise MaskProblemsError(problems)
    scores = tuple(score for result in results for score in result.scores)
    notes = (*layout.notes, *_notes(protocol, scores))
    return MaskEvaluation(protocol, scores, tuple(problems), notes)


class ClipResult(NamedTuple):
    """Scores of one clip's objects, none if it was only checked, and what is wrong with its files."""

    scores: list[ObjectScores]
    problems: list[Problem]


def score_clip(
    clip: Clip, protocol: Protocol, lenient: bool = False, scored: bool = True
) -> ClipResult:
    """Score one clip. Unless `lenient`, the first problem ends the scoring, but not the search for more problems.

    With `scored` False the files are only checked.
    """
    reader = _ClipReader(clip, protocol)
    scorer = _scorer(clip, protocol, reader.true_objects)

    def worth_scoring() -> bool:
        return scored and not any(problem.in_truth or not lenient for problem in reader.problems)

    for _, prediction, truth in reader.frames():
        if worth_scoring():
            scorer.add(prediction, truth)
    return ClipResult(scorer.scores() if worth_scoring() else [], reader.problems)


def read_maps(clip: Clip, protocol: Protocol) -> Iterator[tuple[str, Map, Map]]:
    """The frames of a clip with their predictions and truths `(H, W)` uint8, as they are scored.

    Unusable predictions count as empty; frames with unusable truth are left out.
    """
    yield from _ClipReader(clip, protocol).frames()


class _UnusableError(Exception):
    """A file that holds no usable mask: the kind of problem, and more about it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = detail


class _ClipReader:
    """Reads the maps of a clip frame by frame; a prediction that cannot be used becomes an empty map and a problem."""

    def __init__(self, clip: Clip, protocol: Protocol) -> None:
        self.clip = clip
        self.protocol = protocol
        self.problems: list[Problem] = []
        self.true_objects = 0 if protocol.per_expression else self._count_objects()

    def frames(self) -> Iterator[tuple[str, Map, Map]]:
        clip = self.clip
        for frame, path, source in zip(clip.frames, clip.predictions, clip.truths, strict=True):
            truth = self._truth(frame, source, path)
            if truth is None:
                continue
            prediction = np.zeros_like(truth)
            try:
                if path is not None:
                    prediction = self._usable(read_mask(path), truth, frame)
            except _UnusableError as unusable:
                self._note(unusable.kind, f"{frame}{unusable.detail}")
            yield frame, prediction, truth

    def _count_objects(self) -> int:
        first = self._truth("first frame", self.clip.first_truth)
        if first is None:
            return 0
        count = int(first[first != VOID].max(initial=0))
        if not count:
            self._note("truth", "no object in the first frame")
        return count

    def _truth(self, frame: str, source: Truth, prediction: Path | None = None) -> Map | None:
        try:
            truth = read_mask(source) if isinstance(source, Path) else _decode(source, prediction)
            if self.clip.object_ids is not None:
                return np.isin(truth, list(self.clip.object_ids)).astype(np.uint8)
            return _binary(truth) if self.protocol.per_expression else truth
        except _UnusableError as unusable:
            self._note("truth", f"{frame}: {unusable.kind}{unusable.detail}")
            return None

    def _usable(self, prediction: Map, truth: Map, frame: str) -> Map:
        if prediction.shape != truth.shape:
            got, wanted = ("x".join(map(str, mask.shape[::-1])) for mask in (prediction, truth))
            raise _UnusableError("size", f" ({got}, not {wanted})")
        if self.protocol.per_expression:
            return _binary(prediction)
        most = self.protocol.most_objects or self.true_objects or VOID
        if prediction.max() > most:
            hint = ": a mask saved as 0/255?" if prediction.max() == VOID else ""
            self._note("objects", f"{frame} ({prediction.max()}, at most {most}{hint})")
            return np.where(prediction > most, 0, prediction)
        return prediction

    def _note(self, kind: str, what: str) -> None:
        self.problems.append(Problem(kind, self.clip.name, what))


def _scorer(clip: Clip, protocol: Protocol, true_objects: int) -> "_PairedScorer | _MatchedScorer":
    if protocol.per_expression:
        return _PairedScorer(clip, {clip.expression or "": None})
    if protocol.matching:
        return _MatchedScorer(clip, true_objects, protocol.void)
    return _PairedScorer(clip, {str(number): number for number in range(1, true_objects + 1)})


class _PairedScorer:
    """J and F of masks whose true object is known: `objects` are their names and numbers, None for a binary mask."""

    def __init__(self, clip: Clip, objects: Mapping[str, int | None]) -> None:
        self.clip = clip
        self.objects = objects
        self.pairs: list[list[tuple[float, float]]] = []
        self.seen: set[int | None] = set()

    def add(self, prediction: Map, truth: Map) -> None:
        frame = []
        for number in self.objects.values():
            predicted, true = (
                mask != 0 if number is None else mask == number for mask in (prediction, truth)
            )
            if predicted.any():
                self.seen.add(number)
            scores = sequence_scores(predicted, true)
            frame.append((scores.region[0], scores.contour[0]))
        self.pairs.append(frame)

    def scores(self) -> list[ObjectScores]:
        table = np.array(self.pairs)  # (T, objects, 2)
        return [
            ObjectScores(
                video=self.clip.video,
                name=name,
                frames=self.clip.frames,
                region=table[:, column, 0],
                contour=table[:, column, 1],
                matched=number if number in self.seen else None,
            )
            for column, (name, number) in enumerate(self.objects.items())
        ]


class _MatchedScorer:
    """J and F of every true object against every predicted one, frame by frame, then the assignment."""

    def __init__(self, clip: Clip, true_objects: int, void: bool) -> None:
        self.clip = clip
        self.void = void
        self.true_ids = range(1, true_objects + 1)
        self.frames: list[tuple[list[int], NDArray[np.float64]]] = []

    def add(self, prediction: Map, truth: Map) -> None:
        numbers = range(1, int(prediction.max()) + 1)
        present = [number for number in numbers if (prediction == number).any()]
        void = truth == VOID if self.void else None
        pairs = label_scores(prediction, truth, [*present, _NOBODY], self.true_ids, void)
        self.frames.append((present, np.stack(pairs)))

    def scores(self) -> list[ObjectScores]:
        seen = {number for present, _ in self.frames for number in present}
        table = self._table(max(seen, default=0))
        return [
            ObjectScores(
                video=self.clip.video,
                name=str(true + 1),
                frames=self.clip.frames,
                region=table[0, true, predicted],
                contour=table[1, true, predicted],
                matched=predicted + 1 if predicted + 1 in seen else None,
            )
            for true, predicted in enumerate(_assignment(table))
        ]

    def _table(self, highest: int) -> NDArray[np.float64]:
        """J and F `(2, true, predicted, T)`; objects that a frame does not show score as nothing predicted."""
        true = len(self.true_ids)
        table = np.empty((2, true, max(highest, true), len(self.frames)))
        for t, (present, pairs) in enumerate(self.frames):
            table[..., t] = pairs[..., -1:]
            table[:, :, [number - 1 for number in present], t] = pairs[..., :-1]
        return table


def _assignment(table: NDArray[np.float64]) -> list[int]:
    """The predicted object of each true one, with the highest sum of mean J&F (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    predicted, true = linear_sum_assignment(-table.mean(axis=-1).mean(axis=0).T)
    return [int(predicted[i]) for i in np.argsort(true)]


def read_mask(path: Path) -> Map:
    """The pixel values of a palette, grey or one-bit PNG, `(H, W)` uint8."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in ("1", "L", "P"):
                raise _UnusableError("mode", f" ({image.mode})")
            return np.array(image, dtype=np.uint8)
    except _UnusableError:
        raise
    except IMAGE_ERRORS as error:
        raise _UnusableError("unreadable") from error


def _binary(mask: Map) -> Map:
    """The mask if it has one value beside 0."""
    top = mask.max()
    if np.any((mask != 0) & (mask != top)):
        raise _UnusableError("values", f" ({len(np.unique(mask))} values)")
    return mask


def _decode(mask: RunLengths, prediction: Path | None) -> Map:
    from pycocotools import mask as coco

    if not mask.codes:
        return np.zeros(mask.size or _size_of(prediction), dtype=np.uint8)
    return coco.decode(list(mask.codes)).any(axis=2).astype(np.uint8)


def _size_of(path: Path | None) -> tuple[int, int]:
    """(height, width) of a prediction, one pixel where there is none: an empty mask is as empty at any size."""
    try:
        return (1, 1) if path is None else read_mask(path).shape
    except _UnusableError:
        return (1, 1)


def _in_order(jobs: Sequence[Job], processes: int, advance: Callable[[], None]) -> list[ClipResult]:
    """The results of all jobs, in the order of the jobs."""
    results: dict[int, ClipResult] = {}
    for index, result in _as_done(jobs, min(processes, len(jobs))):
        results[index] = result
        advance()
    return [results[index] for index in range(len(jobs))]


def _as_done(jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, ClipResult]]:
    if processes == 1:
        yield from ((index, score_clip(*job)) for index, job in enumerate(jobs))
        return
    # Processes are not forked from this one: it may run threads by now.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    # The server imports once what all processes need; other start methods ignore this.
    context.set_forkserver_preload([__name__, "scipy.optimize"])
    longest_first = sorted(range(len(jobs)), key=lambda index: -len(jobs[index][0].frames))
    with ProcessPoolExecutor(processes, context, initializer=keep_freed_memory) as pool:
        futures = {pool.submit(score_clip, *jobs[index]): index for index in longest_first}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _notes(protocol: Protocol, scores: Iterable[ObjectScores]) -> list[str]:
    if protocol.per_expression:
        return []
    never = [f"{score.video} {score.name}" for score in scores if score.matched is None]
    return [f"objects with no prediction in any frame: {', '.join(never)}"] if never else []
