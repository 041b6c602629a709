"""Ref-YouTube-VOS and MeViS: one binary mask for each video, expression and frame, each expression scored by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refsam.data import ReferringDataset
from refsam.evaluation.reports.masks import Scored, mask_sections, overall_table
from refsam.evaluation.reports.report import Section, Text
from refsam.evaluation.runners.benchmark import Outcome, VideoBenchmark, texts_of
from refsam.evaluation.runners.run_folder import RunFolder
from refsam.evaluation.scoring.clips import find_clips
from refsam.evaluation.scoring.masks import score_layout
from refsam.evaluation.scoring.own_videos import find_own_clips
from refsam.evaluation.scoring.protocols import find_protocol
from refsam.runtime.files import write_zip


@dataclass(frozen=True)
class PerExpression(VideoBenchmark):
    """Writes predictions `<video>/<expression>/<frame>.png` and a submission; scores them where there is truth.

    `zip_folder` is the folder that the server expects at the top of the zip, "" for none; None where there is no server, as for
    your own videos, whose masks are the truth. `truth` is what `find_clips` takes,
    `listing` the file that says which objects of it an expression means, None where the truth has a folder for each expression.
    """

    title: str
    dataset: ReferringDataset
    zip_folder: str | None
    truth: Path | None = None
    listing: Path | None = None

    def outcome(
        self, run: RunFolder, records: Mapping[str, Mapping[str, Any]], processes: int
    ) -> Outcome:
        """Write a submission where there is a server for it; score the predictions where there is truth."""
        zipped = [] if self.zip_folder is None else [self._submission(run, self.zip_folder)]
        last = [Section("Submission", (Text((line,)),)) for line in zipped]
        if self.truth is None:
            split = f"{self.dataset.name} {self.dataset.split}"
            own = f"masks in {self.dataset.root / self.dataset.split}"
            unscored = f"not scored: no {f'truth for {split}' if zipped else own}"
            sections = [Section("Scores", (Text((unscored,)),)), *last]
            return Outcome("\n".join([unscored, *zipped]), {}, tuple(sections))
        scored = self._scored(run.predictions, self.truth, processes)
        sections = [*mask_sections([scored], self.dataset.frame), *last]
        result, table = scored.result, overall_table([scored]).markdown()
        lines = [*result.protocol.rules, "", table, *(["", *zipped] if zipped else [])]
        files = {"scores.csv": result.as_csv()}
        return Outcome("\n".join(lines), result.as_dict(), tuple(sections), files)

    def _submission(self, run: RunFolder, zip_folder: str) -> str:
        """Write the archive; return a line about its contents."""
        files = [
            f"{unit.name}/{expression.expression_id}/{frame}.png"
            for unit in self.units
            for expression in unit.expressions
            for frame in unit.video.frame_names
        ]
        archive = run.folder / "submission.zip"
        count = write_zip(archive, run.predictions, files, zip_folder)
        top = f"{zip_folder}/" if zip_folder else ""
        return f"{archive}: {count} masks as {top}<video>/<expression>/<frame>.png"

    def _scored(self, predictions: Path, truth: Path, processes: int) -> Scored:
        protocol = find_protocol("per-expression")
        if self.zip_folder is None:
            layout = find_own_clips(predictions, self.dataset)
        else:
            names = [unit.name for unit in self.units]
            layout = find_clips(
                predictions, truth, protocol, videos=names, expressions=self.listing
            )
        result = score_layout(layout, protocol, processes=processes)
        return Scored("", result, layout.clips, texts_of(self.units))
