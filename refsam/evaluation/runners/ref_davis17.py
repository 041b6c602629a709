"""Ref-DAVIS17: four annotators, each a run of its own, their objects joined into one map per frame; the mean of four scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from refsam.data import Expression, ReferringDataset
from refsam.errors import UserError
from refsam.evaluation.reports.masks import Scored, mask_sections, overall_table
from refsam.evaluation.reports.report import Section, Text
from refsam.evaluation.runners.benchmark import Outcome, Unit, VideoBenchmark, texts_of
from refsam.evaluation.runners.inference import MERGE_NOTES, GroupLogits, InferenceRules, MergeRule
from refsam.evaluation.runners.run_folder import RunFolder
from refsam.evaluation.scoring.clips import find_clips
from refsam.evaluation.scoring.masks import score_layout
from refsam.evaluation.scoring.protocols import find_protocol
from refsam.evaluation.scoring.results import mean_measures

ANNOTATORS = ("first frame 1", "full video 1", "first frame 2", "full video 2")
_PER_EXPRESSION = "per-expression"


@dataclass(frozen=True)
class RefDavis17(VideoBenchmark):
    """Predictions `anno_<annotator>/<video>/<frame>.png`, maps of object numbers.

    `scoring` names protocols of `refsam.evaluation.scoring.protocols`; with per-expression among them there are also binary masks
    `expressions/<video>/<expression>/<frame>.png`. `merge` says how objects share pixels.
    Raises UserError for a dataset without truth, or without one expression per annotator and object.
    """

    dataset: ReferringDataset
    merge: MergeRule
    scoring: tuple[str, ...] = ("davis-unsupervised",)
    title = "Ref-DAVIS17"

    def __post_init__(self) -> None:
        for name in self.scoring:
            find_protocol(name)
        if self.dataset.truth is None:
            raise UserError(
                f"ref-davis17: no truth for {self.dataset.split}, want {self.dataset.root}/"
                f"{self.dataset.split}/Annotations"
            )
        for unit in self.units:
            asked = [[e.object_ids for e in group] for group in self.groups(unit)]
            if len(asked) != len(ANNOTATORS) or any(objects != asked[0] for objects in asked):
                raise UserError(
                    f"ref-davis17: {unit.name} does not have one expression per annotator and object"
                )

    def settings(self) -> dict[str, Any]:
        """Dataset, split, and what is drawn into the predictions."""
        drawn = {"joint": self.merge, "per_expression": _PER_EXPRESSION in self.scoring}
        return super().settings() | drawn

    def groups(self, unit: Unit) -> list[list[Expression]]:
        """The expressions of each annotator, by object."""
        return [
            sorted((e for e in unit.expressions if e.annotator == annotator), key=_number)
            for annotator in range(len(ANNOTATORS))
        ]

    def folders(self, unit: Unit) -> list[str]:
        """One for each annotator, and one for the binary masks if they are wanted."""
        folders = [f"anno_{annotator}/{unit.video.name}" for annotator in range(len(ANNOTATORS))]
        if _PER_EXPRESSION in self.scoring:
            folders.append(f"expressions/{unit.video.name}")
        return folders

    def render(
        self, unit: Unit, logits: Sequence[GroupLogits], rules: InferenceRules
    ) -> dict[str, NDArray[Any]]:
        """Each annotator's joint map, and the masks of single expressions if they are wanted."""
        pictures: dict[str, NDArray[Any]] = {}
        for annotator, (group, of_group) in enumerate(zip(self.groups(unit), logits, strict=True)):
            numbers = [_number(expression) for expression in group]
            merged = of_group.merged_map(numbers, self.merge)
            pictures[f"anno_{annotator}/{unit.video.name}"] = merged
            if _PER_EXPRESSION in self.scoring:
                for expression, mask in zip(group, of_group.masks(rules.threshold), strict=True):
                    pictures[f"expressions/{unit.video.name}/{expression.expression_id}"] = mask
        return pictures

    def outcome(
        self, run: RunFolder, records: Mapping[str, Mapping[str, Any]], processes: int
    ) -> Outcome:
        """Each annotator's scores and their mean, by every protocol asked for."""
        texts = [MERGE_NOTES[self.merge]]
        sections = [Section("Joint map", (Text((MERGE_NOTES[self.merge],)),))]
        summary: dict[str, Any] = {"joint": self.merge, "scores": {}}
        files: dict[str, str] = {}
        for name in self.scoring:
            scored = self._scored(run.predictions, name, processes)
            mean = mean_measures(scores.result.overall for scores in scored)
            evaluations = {scores.name: scores.result.as_dict() for scores in scored}
            summary["scores"][name] = {"mean": mean, "evaluations": evaluations}
            texts += [
                "",
                name,
                *(f"  {rule}" for rule in find_protocol(name).rules),
                overall_table(scored).markdown(),
            ]
            sections += [
                Section(f"{section.title} ({name})", section.blocks)
                for section in mask_sections(scored, self.dataset.frame, pictures=name)
            ]
            for index, scores in enumerate(scored):
                part = "" if name == _PER_EXPRESSION else f"_anno_{index}"
                files[f"{name}{part}.csv"] = scores.result.as_csv()
        return Outcome("\n".join(texts), summary, tuple(sections), files)

    def _scored(self, predictions: Path, name: str, processes: int) -> list[Scored]:
        protocol, truth = find_protocol(name), self.dataset.truth
        assert truth is not None  # __post_init__ refuses a dataset without truth
        videos = [unit.video.name for unit in self.units]
        if protocol.per_expression:
            texts = texts_of(self.units)
            parts = {"": (predictions / "expressions", self.dataset.listing, texts)}
        else:
            parts = {
                annotator: (predictions / f"anno_{index}", None, self._texts(index))
                for index, annotator in enumerate(ANNOTATORS)
            }
        scored = []
        for part, (folder, listing, texts) in parts.items():
            layout = find_clips(folder, truth, protocol, videos=videos, expressions=listing)
            result = score_layout(layout, protocol, processes=processes)
            scored.append(Scored(part, result, layout.clips, texts))
        return scored

    def _texts(self, annotator: int) -> dict[tuple[str, str], str]:
        """An annotator's expressions by object."""
        every = [expression for unit in self.units for expression in unit.expressions]
        return {(e.video, str(_number(e))): e.text for e in every if e.annotator == annotator}


def _number(expression: Expression) -> int:
    if not expression.object_ids:
        raise UserError(
            f"ref-davis17: expression {expression.expression_id} of {expression.video} names no object"
        )
    return expression.object_ids[0]
