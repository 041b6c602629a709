"""The report of scored masks: table, protocol, best and worst clips, curves over time, provenance."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refsam.errors import UserError
from refsam.evaluation.reports.pictures import COLOURS, LEGEND, best_and_worst, comparison, strip
from refsam.evaluation.reports.plots import Curve, both_curves, picture
from refsam.evaluation.reports.report import Code, Picture, Section, Table, Text
from refsam.evaluation.scoring.clips import Clip
from refsam.evaluation.scoring.masks import read_maps
from refsam.evaluation.scoring.protocols import Protocol
from refsam.evaluation.scoring.results import (
    MEASURES,
    MaskEvaluation,
    ObjectScores,
    by_video,
    mean_measures,
)
from refsam.images import read_image

FrameReader = Callable[[str, str], NDArray[np.uint8] | None]

_SHOWN_CLIPS = 3
_TILES = 5
_CURVES_OF_BOTH = 4  # J and F of up to this number of objects are drawn, of more J&F alone


@dataclass(frozen=True)
class Scored:
    """An evaluation and the clips that it scored.

    `name` distinguishes several in one report. `texts`: the text of each (video, object or expression).
    """

    name: str
    result: MaskEvaluation
    clips: tuple[Clip, ...]
    texts: Mapping[tuple[str, str], str] = field(default_factory=dict)


def folder_frames(folder: Path) -> FrameReader:
    """Reads frames `<video>/<frame>.jpg`, `.jpeg` or `.png` of a folder as a viewer shows them, None where there is no such file.

    Raises UserError if the folder is not there; reading raises ImageError for a damaged file.
    """
    if not folder.is_dir():
        raise UserError(f"frames: no folder {folder}")

    def read(video: str, frame: str) -> NDArray[np.uint8] | None:
        paths = (folder / video / f"{frame}{suffix}" for suffix in (".jpg", ".jpeg", ".png"))
        path = next((path for path in paths if path.is_file()), None)
        return None if path is None else np.asarray(read_image(path)[0])

    return read


def mask_sections(
    scored: Sequence[Scored], frame: FrameReader | None = None, pictures: str = ""
) -> list[Section]:
    """Sections of a report on one or more evaluations; `frame(video, frame)` gives the pictures to draw on.

    `pictures` is a prefix of the pictures' names, so that one report can hold several such sets of sections.
    """
    rules = dict.fromkeys(scores.result.protocol for scores in scored)
    remarks = [
        f"{scores.name}: {remark}" if scores.name else remark
        for scores in scored
        for remark in scores.result.remarks
    ]
    sections = [
        Section("Scores", (overall_table(scored),)),
        Section("Protocol", tuple(Text((p.name, *p.rules), listed=True) for p in rules)),
        Section("Remarks", (Text(tuple(remarks), listed=True),)),
        Section("Best and worst clips", tuple(_clip_pictures(scored, frame, pictures))),
        Section("Every video", tuple(_video_tables(scored))),
        Section("Over time", tuple(_charts(scored, pictures))),
    ]
    return [section for section in sections if section.title != "Remarks" or remarks]


def provenance_section(facts: Mapping[str, str]) -> Section:
    """The exact command, then everything else that is needed to repeat an evaluation."""
    rest = tuple((name, value) for name, value in facts.items() if name != "command")
    return Section("How it was made", (Code(facts["command"]), Table(("what", "value"), rest)))


def overall_table(scored: Sequence[Scored]) -> Table:
    """Every measure in per cent, a row per evaluation and, of several with one protocol, their mean."""
    overall = [scores.result.overall for scores in scored]
    rows = [
        _row(scores.name or "overall", row) for scores, row in zip(scored, overall, strict=True)
    ]
    if len(scored) > 1 and len({scores.result.protocol for scores in scored}) == 1:
        rows.append(_row("mean", mean_measures(overall)))
    return Table(("", *MEASURES), tuple(rows))


def _row(name: str, measures: Mapping[str, float]) -> tuple[str, ...]:
    return (name, *(f"{100 * measures[measure]:.2f}" for measure in MEASURES))


def _video_tables(scored: Sequence[Scored]) -> Iterable[Table]:
    for scores in scored:
        of = f" ({scores.name})" if scores.name else ""
        videos = tuple(_row(video, row) for video, row in scores.result.videos.items())
        yield Table(("video", *MEASURES), videos, f"Every video{of}")
        objects = tuple(
            _row(_title(scores, score), score.measures) for score in scores.result.scores
        )
        unit = "expression" if scores.result.protocol.per_expression else "object"
        yield Table((unit, *MEASURES), objects, f"Every {unit}{of}", folded=True)


def _charts(scored: Sequence[Scored], pictures: str) -> Iterable[Picture | Text]:
    for scores in scored:
        for video, objects in sorted(by_video(scores.result.scores).items()):
            both = len(objects) <= _CURVES_OF_BOTH
            curves = [c for index, score in enumerate(objects) for c in _curves(index, score, both)]
            name = " ".join(filter(None, (scores.name, video)))
            drawn = "J (solid) and F (dashed)" if both else "J&F"
            caption = f"{name}: {drawn} of each frame"
            title = f"{pictures} curves {name}".strip()
            yield picture(title, curves, objects[0].frames, caption)


def _curves(index: int, score: ObjectScores, both: bool) -> list[Curve]:
    if both:
        return both_curves(index, score)
    label = f"{score.name}: J&F {score.measures['J&F-Mean']:.3f}"
    return [Curve(label, (score.region + score.contour) / 2, COLOURS[index % len(COLOURS)])]


def _clip_pictures(
    scored: Sequence[Scored], frame: FrameReader | None, pictures: str
) -> Iterable[Picture | Text]:
    """The clips with the highest and the lowest J&F of all evaluations, the worst one last."""
    every = ((scores, score) for scores in scored for score in scores.result.scores)
    chosen = best_and_worst(every, lambda pair: pair[1].measures["J&F-Mean"], _SHOWN_CLIPS)
    yield Text((f"{LEGEND}. Up to {_TILES} frames of each clip, evenly spaced.",))
    for index, (rank, (scores, score)) in enumerate(chosen):
        title = " ".join(filter(None, (scores.name, _title(scores, score))))
        caption = f"{rank}: {title}, J&F {100 * score.measures['J&F-Mean']:.1f}"
        content = _overlay(_clip_of(scores.clips, score), scores.result.protocol, score, frame)
        yield Picture(f"{pictures} {index:02d} {rank}".strip(), "image/jpeg", content, caption)


def _title(scores: Scored, score: ObjectScores) -> str:
    text = scores.texts.get((score.video, score.name))
    return f"{score.video} {score.name}" + (f' "{text}"' if text else "")


def _clip_of(clips: Iterable[Clip], score: ObjectScores) -> Clip:
    return next(
        clip
        for clip in clips
        if clip.video == score.video and clip.expression in (None, score.name)
    )


def _overlay(
    clip: Clip, protocol: Protocol, score: ObjectScores, frame: FrameReader | None
) -> bytes:
    """A few frames of one object with its predicted and its true mask."""
    last = len(clip.frames) - 1
    places = sorted({round(last * tile / (_TILES - 1)) for tile in range(_TILES)})
    few = replace(
        clip,
        frames=tuple(clip.frames[i] for i in places),
        truths=tuple(clip.truths[i] for i in places),
        predictions=tuple(clip.predictions[i] for i in places),
    )
    tiles = {}
    for name, prediction, truth in read_maps(few, protocol):
        if protocol.per_expression:
            masks = prediction != 0, truth != 0
        else:
            masks = prediction == (score.matched or -1), truth == int(score.name)
        image = frame(clip.video, name) if frame is not None else None
        tiles[name] = comparison(image, *masks)
    return strip(tiles)
