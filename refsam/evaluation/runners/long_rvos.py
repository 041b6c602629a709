"""Long-RVOS: scores of single expressions, as on MeViS, and of the times at which objects are seen: tIoU and vIoU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refsam.data.long_rvos import expression_types
from refsam.evaluation.reports.report import Section, Table, Text
from refsam.evaluation.runners.benchmark import Outcome, Unit
from refsam.evaluation.runners.per_expression import PerExpression
from refsam.evaluation.runners.run_folder import RunFolder
from refsam.evaluation.scoring.results import as_csv, mean_measures
from refsam.metrics import contour_accuracy, region_similarity

RULES = (
    "J and F: mean over the frames of an expression, then over expressions; 1 in frames where both masks are empty.",
    "tIoU: frames in which both masks are there, over frames in which either is; 1 where no frame shows anything.",
    "vIoU: the sum of J over frames in which both are there, over frames in which either is; 1 where no frame shows anything.",
)
_NAMES = ("J&F", "J", "F", "tIoU", "vIoU")


@dataclass(frozen=True)
class LongRvos(PerExpression):
    """Predictions `<video>/<expression>/<frame>.png`; frames are scored while they are predicted, so memory does not grow."""

    def rows(
        self, unit: Unit, frame: str, rendered: Mapping[str, NDArray[np.bool_]]
    ) -> list[Mapping[str, Any]]:
        """J, F and whether the object is marked and shown, for each expression; no rows without truth."""
        rows: list[Mapping[str, Any]] = []
        for expression in unit.expressions:
            mask = rendered[f"{unit.video.name}/{expression.expression_id}"]
            truth = unit.dataset.mask(expression, frame, (mask.shape[0], mask.shape[1]))
            if truth is None:
                return []
            rows.append(
                {
                    "expression": expression.expression_id,
                    "J": float(region_similarity(mask[None], truth[None])[0]),
                    "F": float(contour_accuracy(mask[None], truth[None])[0]),
                    "marked": bool(mask.any()),
                    "shown": bool(truth.any()),
                }
            )
        return rows

    def outcome(
        self, run: RunFolder, records: Mapping[str, Mapping[str, Any]], processes: int
    ) -> Outcome:
        """The means over all expressions, and over those of each type."""
        scores = {
            (unit.video.name, name): _of_expression([r for r in rows if r["expression"] == name])
            for unit in self.units
            if (rows := records[unit.name]["rows"])
            for name in (e.expression_id for e in unit.expressions)
        }
        if not scores:
            text = f"not scored: no truth for {self.dataset.name} {self.dataset.split}"
            return Outcome(text, {}, (Section("Scores", (Text((text,)),)),))
        types = expression_types(self.dataset)
        kinds = ["all", *sorted(set(types.values()))]
        means = {
            kind: mean_measures(s for key, s in scores.items() if kind in ("all", types.get(key)))
            for kind in kinds
        }
        rows = tuple((k, *(f"{100 * m[name]:.2f}" for name in _NAMES)) for k, m in means.items())
        table = Table(("expressions", *_NAMES), rows, " ".join(RULES))
        sections = (Section("Scores", (table,)), Section("Rules", (Text(RULES, listed=True),)))
        text = "\n".join([*RULES, "", table.markdown()])
        lines = ([*key, *score.values()] for key, score in scores.items())
        files = {"scores.csv": as_csv(["video", "expression", *_NAMES], lines)}
        return Outcome(text, {"scores": means}, sections, files)


def _of_expression(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    region, contour = (np.array([row[name] for row in rows]) for name in "JF")
    marked, shown = (np.array([row[name] for row in rows], bool) for name in ("marked", "shown"))
    both, either = marked & shown, int((marked | shown).sum())
    return {
        "J&F": float(region.mean() + contour.mean()) / 2,
        "J": float(region.mean()),
        "F": float(contour.mean()),
        "tIoU": float(both.sum() / either) if either else 1.0,
        "vIoU": float(region[both].sum() / either) if either else 1.0,
    }
