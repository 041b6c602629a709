"""Ref-YouTube-VOS and MeViS: one binary mask for each video, expression and frame, each expression scored by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refsam.data import Expression, ReferringDataset
from refsam.evaluation.reports.masks import Scored, mask_sections, overall_table
from refsam.evaluation.reports.report import Section, Text
from refsam.evaluation.runners.benchmark import Outcome, Unit, in_groups
from refsam.evaluation.runners.inference import FrameLogits, InferenceRules
from refsam.evaluation.runners.run_folder import RunFolder
from refsam.evaluation.runners.submissions import write_submission
from refsam.evaluation.scoring.clips import find_clips
from refsam.evaluation.scoring.masks import score_layout
from refsam.evaluation.scoring.own_videos import find_own_clips
from refsam.evaluation.scoring.protocols import find_protocol


@dataclass(frozen=True)
class PerExpression:
    """Predictions `<video>/<expression>/<frame>.png`, always a submission, and scores where there is truth.

    `zip_folder` is the folder that the server wants at the top of the zip, "" for none; None where there is no server, as for own
    videos, whose masks are the truth. `truth` is what `find_clips` takes,
    `listing` the file that says which objects of it an expression means, None where the truth has a folder for each expression.
    """

    title: str
    dataset: ReferringDataset
    zip_folder: str | None
    truth: Path | None = None
    listing: Path | None = None

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """A unit for each video."""
        return tuple(Unit(video.name, self.dataset, video) for video in self.dataset.videos)

    def settings(self) -> Mapping[str, Any]:
        """Dataset and split."""
        return {"dataset": self.dataset.name, "split": self.dataset.split}

    def groups(self, unit: Unit) -> list[list[Expression]]:
        """Expressions in file order."""
        return in_groups(unit.expressions)

    def folders(self, unit: Unit) -> list[str]:
        """The video's."""
        return [unit.video.name]

    def render(
        self, unit: Unit, logits: Sequence[FrameLogits], rules: InferenceRules
    ) -> dict[str, NDArray[Any]]:
        """A mask for each expression."""
        masks = [mask for group in logits for mask in group.masks(rules.threshold)]
        pairs = zip(unit.expressions, masks, strict=True)
        return {f"{unit.video.name}/{e.expression_id}": mask for e, mask in pairs}

    def rows(
        self, unit: Unit, frame: str, rendered: Mapping[str, NDArray[np.bool_]]
    ) -> list[Mapping[str, Any]]:
        """Nothing: the PNGs say it all."""
        return []

    def outcome(
        self, run: RunFolder, records: Mapping[str, Mapping[str, Any]], processes: int
    ) -> Outcome:
        """Write the submission; score the predictions where there is truth."""
        if self.zip_folder is None:
            return self._own_outcome(run, processes)
        archive = run.folder / "submission.zip"
        count = write_submission(archive, run.predictions, self._files(), self.zip_folder)
        top = f"{self.zip_folder}/" if self.zip_folder else ""
        zipped = f"{archive}: {count} masks as {top}<video>/<expression>/<frame>.png"
        submission = Section("Submission", (Text((zipped,)),))
        if self.truth is None:
            unscored = f"not scored: no truth for {self.dataset.name} {self.dataset.split}"
            sections = [Section("Scores", (Text((unscored,)),)), submission]
            return Outcome(f"{unscored}\n{zipped}", {}, tuple(sections))
        scored = self._scored(run.predictions, self.truth, processes)
        sections = [*mask_sections([scored], self.dataset.frame), submission]
        rules = scored.result.protocol.rules
        text = "\n".join([*rules, "", overall_table([scored]).markdown(), "", zipped])
        files = {"scores.csv": scored.result.as_csv()}
        return Outcome(text, scored.result.as_dict(), tuple(sections), files)

    def _own_outcome(self, run: RunFolder, processes: int) -> Outcome:
        """Scores of own videos, for which there is no server."""
        if self.truth is None:
            unscored = f"not scored: no masks in {self.dataset.root / self.dataset.split}"
            return Outcome(unscored, {}, (Section("Scores", (Text((unscored,)),)),))
        protocol = find_protocol("per-expression")
        layout = find_own_clips(run.predictions, self.dataset)
        result = score_layout(layout, protocol, processes=processes)
        scored = Scored("", result, layout.clips, self._texts())
        text = "\n".join([*protocol.rules, "", overall_table([scored]).markdown()])
        sections = tuple(mask_sections([scored], self.dataset.frame))
        return Outcome(text, result.as_dict(), sections, {"scores.csv": result.as_csv()})

    def _texts(self) -> dict[tuple[str, str], str]:
        every = [expression for unit in self.units for expression in unit.expressions]
        return {(e.video, e.expression_id): e.text for e in every}

    def _files(self) -> list[str]:
        return [
            f"{unit.video.name}/{expression.expression_id}/{frame}.png"
            for unit in self.units
            for expression in unit.expressions
            for frame in unit.video.frame_names
        ]

    def _scored(self, predictions: Path, truth: Path, processes: int) -> Scored:
        protocol = find_protocol("per-expression")
        videos = [unit.video.name for unit in self.units]
        layout = find_clips(predictions, truth, protocol, videos=videos, expressions=self.listing)
        result = score_layout(layout, protocol, processes=processes)
        return Scored("", result, layout.clips, self._texts())
