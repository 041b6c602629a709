"""Pair predictions, of a benchmark run or of `refsam segment-videos`, with the masks of your own videos."""

import json
from collections.abc import Iterable
from pathlib import Path

from refsam.data import Expression, ReferringDataset, VideoRecord
from refsam.data.masks import NumberedMasks
from refsam.errors import UserError
from refsam.evaluation.scoring.clips import Clip, Layout, visible
from refsam.evaluation.scoring.problems import Problem


def find_own_clips(predictions: Path, dataset: ReferringDataset) -> Layout:
    """Pair the masks of your own videos with `<video>/<expression>/<frame>.png`; expressions are their numbers in the table.

    The numbers begin at 0. A video may instead have the form that `refsam segment` and `segment-videos` write: `result.json`
    has the expressions, and masks are `masks/<number>/<number of the frame>.png`. Frames without a true mask are not scored.
    Raises UserError without predictions or truth.
    """
    source = dataset.mask_source
    if not isinstance(source, NumberedMasks):
        raise UserError(
            f"truth: no masks in {dataset.root / dataset.split}, want masks/<video>/<frame>.png"
        )
    if not predictions.is_dir():
        raise UserError(f"prediction: no folder {predictions}")
    clips: list[Clip] = []
    found = {path.name for path in visible(predictions) if path.is_dir()}
    extra = sorted(found - {video.name for video in dataset.videos})
    problems = [Problem("video extra", "", name) for name in extra]
    for video in dataset.videos:
        if not video.annotated:
            continue
        if not (predictions / video.name).is_dir():
            problems.append(Problem("video missing", "", video.name))
        listed = _segmented(predictions / video.name)
        truths = tuple(source.file(video.name, frame) for frame in video.annotated)
        for expression in dataset.expressions(video.name):
            paths = _paths(predictions, video, expression, listed, problems)
            clips.append(
                Clip(
                    video.name,
                    expression.expression_id,
                    video.annotated,
                    truths,
                    tuple(paths),
                    truths[0],
                    object_ids=frozenset(expression.object_ids or ()),
                )
            )
    unscored = [video.name for video in dataset.videos if not video.annotated]
    notes = (f"not scored, as they have no masks: {', '.join(unscored)}",) if unscored else ()
    return Layout(tuple(clips), tuple(problems), notes)


def _segmented(folder: Path) -> list[str] | None:
    """The expressions of a video in the order of their masks, None where it has not the form that `refsam segment` writes."""
    file = folder / "result.json"
    if not file.is_file():
        return None
    try:
        return [entry["text"] for entry in json.loads(file.read_bytes())["expressions"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read: {error!r}") from error


def _paths(
    predictions: Path,
    video: VideoRecord,
    expression: Expression,
    listed: list[str] | None,
    problems: list[Problem],
) -> Iterable[Path | None]:
    """The prediction of each annotated frame, None where it is missing, which is noted."""
    folder = predictions / video.name
    if listed is not None and expression.text not in listed:
        problems.append(Problem("expression missing", video.name, repr(expression.text)))
        return [None] * len(video.annotated)
    place = {frame: index for index, frame in enumerate(video.frame_names)}
    found: list[Path | None] = []
    for frame in video.annotated:
        if listed is None:
            path = folder / expression.expression_id / f"{frame}.png"
        else:
            number = listed.index(expression.text)
            path = folder / "masks" / f"{number:02d}" / f"{place[frame]:05d}.png"
        found.append(path if path.is_file() else None)
        if found[-1] is None and folder.is_dir():
            problems.append(
                Problem("frame missing", f"{video.name}/{expression.expression_id}", frame)
            )
    return found
