"""Scores of masks per object, per video and overall, as table, JSON and CSV."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refsam.errors import UserError
from refsam.evaluation.scoring.problems import Problem, describe
from refsam.evaluation.scoring.protocols import Protocol
from refsam.metrics import statistics

MEASURES = tuple(
    f"{measure}-{statistic}"
    for measure in ("J&F", "J", "F")
    for statistic in ("Mean", "Recall", "Decay")
)
_TABLE_ROWS = 120


@dataclass(frozen=True)
class ObjectScores:
    """J and F of one object, or of one expression, in every scored frame.

    `name` is the object's number or the expression's; `frames` names the T frames; `region` and `contour` are `(T,)` float64;
    `matched` is the number of the predicted object, None where there is none.
    """

    video: str
    name: str
    frames: tuple[str, ...]
    region: NDArray[np.float64]
    contour: NDArray[np.float64]
    matched: int | None = None

    @property
    def measures(self) -> dict[str, float]:
        """Mean, recall and decay of J&F (the mean of both in each frame), J and F."""
        sequences = ((self.region + self.contour) / 2, self.region, self.contour)
        values = [value for sequence in sequences for value in statistics(sequence)]
        return dict(zip(MEASURES, values, strict=True))


@dataclass(frozen=True)
class MaskEvaluation:
    """Scores of all objects under a protocol, what could not be used and was scored as empty, and notes."""

    protocol: Protocol
    scores: tuple[ObjectScores, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def overall(self) -> dict[str, float]:
        """Every measure, averaged over all objects (or expressions) of all videos."""
        return mean_measures(score.measures for score in self.scores)

    @property
    def videos(self) -> dict[str, dict[str, float]]:
        """Every measure, averaged over the objects of each video."""
        return {
            video: mean_measures(score.measures for score in scores)
            for video, scores in by_video(self.scores).items()
        }

    @property
    def remarks(self) -> list[str]:
        """Everything a reader must know besides the scores: notes, and what was scored as empty."""
        lines = describe(self.problems)
        if lines:
            lines.insert(
                0, f"{len(self.problems)} problems; what could not be used was scored as empty:"
            )
        return [*self.notes, *lines]

    def table(self) -> str:
        """The scores in per cent as text, with the protocol's rules and all remarks."""
        unit = "expression" if self.protocol.per_expression else "object"
        rows = [((score.video, score.name), score.measures) for score in self.scores]
        remarks = self.remarks
        if len(rows) > _TABLE_ROWS:
            remarks.append(
                f"{len(rows)} {unit}s, shown per video; --csv and --json hold every {unit}"
            )
            rows = [((video, "(mean)"), measures) for video, measures in self.videos.items()]
        rows.append((("overall", f"({len(self.scores)})"), self.overall))
        lines = [
            f"protocol: {self.protocol.name}",
            *(f"  {rule}" for rule in self.protocol.rules),
            "",
        ]
        return "\n".join([*lines, *_aligned(rows, unit), *(["", *remarks] if remarks else [])])

    def as_dict(self) -> dict[str, Any]:
        """Everything, including the scores of each frame, in types that JSON has."""
        return {
            "protocol": self.protocol.name,
            "rules": list(self.protocol.rules),
            "overall": self.overall,
            "videos": self.videos,
            "objects": [_object_entry(score) for score in self.scores],
            "problems": describe(self.problems),
            "notes": list(self.notes),
        }

    def as_csv(self) -> str:
        """One row per object, and the overall scores as the last one."""
        rows = [
            [score.video, score.name, score.matched, len(score.frames), *score.measures.values()]
            for score in self.scores
        ]
        frames = sum(len(score.frames) for score in self.scores)
        overall = ["overall", len(self.scores), None, frames, *self.overall.values()]
        return as_csv(["video", "object", "matched", "frames", *MEASURES], [*rows, overall])


def check_writable(path: Path, *, make_folder: bool = False) -> None:
    """Raise UserError unless a file can be written there; call it before the long work.

    `make_folder` makes its folder if there is none.
    """
    folder = path.parent
    if make_folder and not folder.exists():
        folder.mkdir(parents=True)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, want the name of a file")
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: the folder {folder} cannot be written")


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV text, None as an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def as_json(content: Mapping[str, Any]) -> str:
    """JSON text, indented, non-ASCII kept."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _object_entry(score: ObjectScores) -> dict[str, Any]:
    return {
        "video": score.video,
        "object": score.name,
        "matched": score.matched,
        **score.measures,
        "frames": list(score.frames),
        "J": score.region.tolist(),
        "F": score.contour.tolist(),
    }


def by_video(scores: Iterable[ObjectScores]) -> dict[str, list[ObjectScores]]:
    """The scores of each video, in their order."""
    groups: dict[str, list[ObjectScores]] = {}
    for score in scores:
        groups.setdefault(score.video, []).append(score)
    return groups


def mean_measures(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over rows that hold the same ones, in their order; all rows have the same weight."""
    table = list(rows)
    return {measure: float(np.mean([row[measure] for row in table])) for measure in table[0]}


def _aligned(rows: Sequence[tuple[tuple[str, str], Mapping[str, float]]], unit: str) -> list[str]:
    names = [("video", unit), *(name for name, _ in rows)]
    widths = [max(len(name[column]) for name in names) for column in (0, 1)]
    header = " ".join(f"{measure:>10}" for measure in MEASURES)
    lines = [f"{'video':{widths[0]}} {unit:>{widths[1]}} {header}"]
    for (video, name), measures in rows:
        cells = " ".join(f"{100 * measures[measure]:10.2f}" for measure in MEASURES)
        lines.append(f"{video:{widths[0]}} {name:>{widths[1]}} {cells}")
    return lines
