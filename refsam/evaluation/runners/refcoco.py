"""RefCOCO, RefCOCO+ and RefCOCOg: overall IoU, mean IoU and P@0.5 to 0.9 of each split, by the conventions of several papers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refsam.data import ReferringDataset
from refsam.errors import UserError
from refsam.evaluation.reports.pictures import COLOURS, LEGEND, best_and_worst, comparison, strip
from refsam.evaluation.reports.plots import Curve, picture
from refsam.evaluation.reports.report import Picture, Section, Table, Text
from refsam.evaluation.runners.benchmark import Benchmark, Outcome, Unit
from refsam.evaluation.runners.run_folder import RunFolder
from refsam.evaluation.scoring.results import as_csv
from refsam.metrics.referring_image import (
    CONVENTIONS,
    THRESHOLDS,
    intersection_union,
    referring_image_scores,
)

_SHOWN = 5


@dataclass(frozen=True)
class Sample:
    """One expression about one image, and the pixels in intersection and union of its masks."""

    split: str
    image: str
    expression: str
    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Intersection over union, 1 where both masks are empty."""
        return self.intersection / self.union if self.union else 1.0


@dataclass(frozen=True)
class RefCoco(Benchmark):
    """Predictions `<split>/<image>/<expression>/<image>.png` of one or more splits, binary masks.

    `conventions` names those of `refsam.metrics.referring_image.CONVENTIONS` to print; the JSON holds all of them.
    Raises UserError for an unknown one and for a split without expressions.
    """

    datasets: tuple[ReferringDataset, ...]
    conventions: tuple[str, ...] = ("referformer",)

    def __post_init__(self) -> None:
        for name in self.conventions:
            if name not in CONVENTIONS:
                raise UserError(f"convention: got {name!r}, want one of {', '.join(CONVENTIONS)}")
        for dataset in self.datasets:
            if not any(dataset.expressions(video.name) for video in dataset.videos):
                raise UserError(f"{dataset.name}: no expressions in {dataset.split}")

    @cached_property
    def title(self) -> str:  # type: ignore[override]  # never assigned
        """The dataset with its splits."""
        splits = ", ".join(dataset.split for dataset in self.datasets)
        return f"{self.datasets[0].name} {splits}"

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """A unit for each image of each split."""
        return tuple(
            Unit(f"{dataset.split}/{video.name}", dataset, video)
            for dataset in self.datasets
            for video in dataset.videos
        )

    def settings(self) -> Mapping[str, Any]:
        """Dataset and splits."""
        return {
            "dataset": self.datasets[0].name,
            "splits": [dataset.split for dataset in self.datasets],
        }

    def rows(
        self, unit: Unit, frame: str, rendered: Mapping[str, NDArray[np.bool_]]
    ) -> list[Mapping[str, Any]]:
        """Intersection and union of each expression."""
        rows: list[Mapping[str, Any]] = []
        for expression in unit.expressions:
            mask = rendered[f"{unit.name}/{expression.expression_id}"]
            truth = unit.dataset.mask(expression, frame, (mask.shape[0], mask.shape[1]))
            if truth is None:
                raise UserError(
                    f"{unit.dataset.name}: no truth for {expression.expression_id} of {unit.name}"
                )
            intersection, union = intersection_union(mask, truth)
            name = expression.expression_id
            rows.append({"expression": name, "intersection": intersection, "union": union})
        return rows

    def outcome(
        self, run: RunFolder, records: Mapping[str, Mapping[str, Any]], processes: int
    ) -> Outcome:
        """The scores of every split."""
        samples = [
            Sample(unit.dataset.split, unit.video.name, row["expression"], row["intersection"], row["union"])
            for unit in self.units
            for row in records[unit.name]["rows"]
        ]  # fmt: skip
        scores = {
            dataset.split: _scores([s for s in samples if s.split == dataset.split])
            for dataset in self.datasets
        }
        tables = [_table(name, scores) for name in self.conventions]
        rules = {name: CONVENTIONS[name].rules for name in CONVENTIONS}
        sections = (
            Section("Scores", tuple(tables)),
            Section("Best and worst samples", tuple(self._pictures(run, samples))),
            Section("Precision", (_precision_chart(samples),)),
        )
        text = "\n\n".join(f"{table.caption}\n{table.markdown()}" for table in tables)
        summary = {"conventions": rules, "splits": scores}
        table_of_samples = as_csv([field.name for field in fields(Sample)], map(astuple, samples))
        return Outcome(text, summary, sections, {"scores.csv": table_of_samples})

    def _pictures(self, run: RunFolder, samples: Sequence[Sample]) -> Iterable[Picture | Text]:
        yield Text((f"{LEGEND}.",))
        chosen = best_and_worst(samples, lambda sample: sample.iou, _SHOWN)
        units = {unit.name: unit for unit in self.units}
        for index, (rank, sample) in enumerate(chosen):
            unit = units[f"{sample.split}/{sample.image}"]
            expression = next(e for e in unit.expressions if e.expression_id == sample.expression)
            file = run.predictions / unit.name / sample.expression / f"{sample.image}.png"
            mask = np.asarray(Image.open(file)) > 0
            truth = unit.dataset.mask(expression, sample.image, (mask.shape[0], mask.shape[1]))
            assert truth is not None  # `rows` has compared it
            image = unit.dataset.frame(unit.video.name, sample.image)
            caption = f'{rank}: {unit.name} "{expression.text}", IoU {100 * sample.iou:.1f}'
            tile = {sample.image: comparison(image, mask, truth)}
            yield Picture(f"{index:02d} {rank}", "image/jpeg", strip(tile), caption)


def _scores(samples: Sequence[Sample]) -> dict[str, Any]:
    """Scores of one split by every convention."""
    counts = [s.intersection for s in samples], [s.union for s in samples]
    found: dict[str, Any] = {"samples": len(samples)}
    for name in CONVENTIONS:
        scores = referring_image_scores(*counts, convention=name)
        found[name] = {
            "oIoU": scores.overall_iou,
            "mIoU": scores.mean_iou,
            **{f"P@{x}": share for x, share in scores.precision.items()},
        }
    return found


def _table(convention: str, scores: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("split", "samples", "oIoU", "mIoU", *(f"P@{x}" for x in THRESHOLDS))
    rows = tuple(
        (split, str(row["samples"]), *(f"{100 * row[convention][name]:.2f}" for name in header[2:]))
        for split, row in scores.items()
    )
    return Table(header, rows, f"Convention {convention}: {CONVENTIONS[convention].rules}")


def _precision_chart(samples: Sequence[Sample]) -> Picture | Text:
    levels = np.linspace(0, 1, 101)
    curves = []
    for index, split in enumerate(dict.fromkeys(sample.split for sample in samples)):
        ious = np.array([sample.iou for sample in samples if sample.split == split])
        shares = (ious[:, None] > levels).mean(axis=0)
        curves.append(Curve(split, shares, COLOURS[index % len(COLOURS)]))
    names = tuple(f"IoU {level:.2f}" for level in levels)
    return picture("precision", curves, names, "Share of samples with an IoU above each level")
