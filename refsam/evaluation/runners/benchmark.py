"""Run a model on a benchmark: processes share the units of work, each is predicted once, then all are scored."""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from refsam.checkpoint import tensors_sha256
from refsam.data import Expression, ReferringDataset, VideoRecord
from refsam.evaluation.reports.masks import provenance_section
from refsam.evaluation.reports.report import Section, Text, write_report
from refsam.evaluation.runners.inference import (
    GroupLogits,
    InferenceRules,
    VideoPredictor,
)
from refsam.evaluation.runners.run_folder import RunFolder
from refsam.evaluation.runners.speed import STAGES, StageClock, speed_summary, speed_table
from refsam.evaluation.scoring.problems import MaskProblemsError, Problem, describe
from refsam.evaluation.scoring.results import as_json
from refsam.model import PromptedSAM
from refsam.model.text_encoder import refused_expressions
from refsam.runtime.device import precision_facts
from refsam.runtime.files import replace_file
from refsam.runtime.provenance import installed, provenance
from refsam.session import Shard
from refsam.video import prefetch
from refsam.video.mask_formats import encode_mask, encode_numbers

_COMPUTED_TOGETHER = 16
_Record = Mapping[str, Any]
_Pictures = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Unit:
    """A unit of work: a video of a dataset; an image is a video of one frame."""

    name: str
    dataset: ReferringDataset
    video: VideoRecord

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """All expressions about the video."""
        return self.dataset.expressions(self.video.name)

    @property
    def cost(self) -> float:
        """The approximate cost in image encodings: decoding eight expressions takes about as long as encoding one image."""
        return len(self.video.frame_names) * (1 + len(self.expressions) / 8)


@dataclass(frozen=True)
class Outcome:
    """The results of a benchmark: the `text` to print, a JSON `summary`, more `files` by name, sections of the report."""

    text: str
    summary: Mapping[str, Any]
    sections: tuple[Section, ...]
    files: Mapping[str, str] = field(default_factory=dict)


class Benchmark(ABC):
    """The parts in which benchmarks differ; `evaluate` does everything else.

    `title` is that of the report. Unless a benchmark overrides them, predictions are binary masks
    `<unit>/<expression>/<frame>.png`, and a unit's record has no rows.
    """

    title: str

    @property
    @abstractmethod
    def units(self) -> Sequence[Unit]:
        """All units of work."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Everything else that predictions depend on, besides the model, the data and the inference rules."""

    def groups(self, unit: Unit) -> list[list[Expression]]:
        """The expressions of a unit in groups that are computed together: file order, as many as memory allows."""
        every = unit.expressions
        starts = range(0, len(every), _COMPUTED_TOGETHER)
        return [list(every[start : start + _COMPUTED_TOGETHER]) for start in starts]

    def folders(self, unit: Unit) -> list[str]:
        """The folders below `predictions` that a unit fills."""
        return [unit.name]

    def render(
        self, unit: Unit, logits: Sequence[GroupLogits], rules: InferenceRules
    ) -> dict[str, NDArray[Any]]:
        """The pictures of one frame by their folder below `predictions`: masks `(H, W)` bool, maps `(H, W)` uint8.

        `logits` are those of each group.
        """
        masks = [mask for group in logits for mask in group.masks(rules.threshold)]
        pairs = zip(unit.expressions, masks, strict=True)
        return {f"{unit.name}/{e.expression_id}": mask for e, mask in pairs}

    def rows(self, unit: Unit, frame: str, rendered: _Pictures) -> list[_Record]:
        """The rows of a frame in the unit's record."""
        return []

    @abstractmethod
    def outcome(self, run: RunFolder, records: Mapping[str, _Record], processes: int) -> Outcome:
        """Score the predictions of all units; `records` by unit. Up to `processes` processes share the scoring."""


class VideoBenchmark(Benchmark):
    """A benchmark on the videos of one split of one dataset."""

    dataset: ReferringDataset

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """A unit for each video."""
        return tuple(Unit(video.name, self.dataset, video) for video in self.dataset.videos)

    def settings(self) -> dict[str, Any]:
        """Dataset and split."""
        return {"dataset": self.dataset.name, "split": self.dataset.split}


def texts_of(units: Sequence[Unit]) -> dict[tuple[str, str], str]:
    """The text of each (video, expression)."""
    return {(e.video, e.expression_id): e.text for unit in units for e in unit.expressions}


@dataclass(frozen=True)
class Runner:
    """A model, what it is called, and how it is run.

    With `missing` "zero", expressions that the model refuses get no mask, else they stop the run.
    """

    model: PromptedSAM
    checkpoint: str
    rules: InferenceRules
    precision: torch.dtype = torch.float32
    missing: str = "error"

    def settings(self, units: Sequence[Unit]) -> dict[str, Any]:
        """All that a prediction depends on, in types that JSON has."""
        text_encoder = self.model.text_source()
        return {
            "refsam": installed("refsam"),
            "protocol": self.rules.name,
            "weights_sha256": tensors_sha256(self.model.state_dict()),
            "text_encoder": str(text_encoder or "in the checkpoint"),
            "image_size": self.model.image_size,
            "device": self.model.device.type,
            **precision_facts(self.precision, self.model.image_encoder.product_dtype),
            "data_sha256": _data_sha256(units),
        }

    def refused(self, units: Sequence[Unit]) -> frozenset[str]:
        """Expressions that get no mask; raises MaskProblemsError for them unless `missing` is "zero"."""
        asked = [
            (unit.name, e.text, self.rules.text(e.text)) for unit in units for e in unit.expressions
        ]
        reasons = refused_expressions(self.model.encode_text, [given for _, _, given in asked])
        problems = [
            Problem("expression refused", name, f"{text!r} ({reasons[given]})")
            for name, text, given in asked
            if given in reasons
        ]
        if problems and self.missing != "zero":
            raise MaskProblemsError(problems)
        return frozenset(text for _, text, given in asked if given in reasons)

    def predict(
        self, benchmark: Benchmark, unit: Unit, run: RunFolder, refused: frozenset[str]
    ) -> None:
        """Write the pictures of one unit and, as the last thing, its record."""
        started, clock = time.perf_counter(), StageClock(self._synchronize)
        self.model.forget_text()  # so that "prompt" holds the time of encoding
        predictor = VideoPredictor(
            self.model,
            self.rules,
            [[e.text for e in group] for group in benchmark.groups(unit)],
            precision=self.precision,
            clock=clock,
            refused=refused,
        )
        rows: list[_Record] = []
        with (
            run.unit(unit.name, benchmark.folders(unit)) as (folder, facts),
            closing(prefetch(_frames(unit, clock))) as frames,
        ):
            for frame, image in frames:
                logits = predictor.step(image)
                with clock.stage("decode masks"):
                    rendered = benchmark.render(unit, logits, self.rules)
                with clock.stage("write"):
                    _write_pictures(folder, frame, rendered)
                rows += benchmark.rows(unit, frame, rendered)
            facts |= {
                "frames": len(unit.video.frame_names),
                "expressions": len(unit.expressions),
                "refused": [e.text for e in unit.expressions if e.text in refused],
                "seconds": clock.take(),
                "total_seconds": round(time.perf_counter() - started, 6),
                "rows": rows,
            }

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def evaluate(
    benchmark: Benchmark,
    runner: Runner,
    out: Path,
    *,
    shard: Shard | None = None,
    processes: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Outcome | None:
    """Predict this process's share of a benchmark into `out`, and score everything if nothing is left to do.

    Finished units are skipped. `advance` is called after every unit of the shard. Returns None where other processes still
    have units to do: the last one scores.
    Raises UserError for a folder that cannot be used and for data that is not complete, with all that is wrong.
    """
    units, shard = benchmark.units, shard or Shard.from_environment()
    _check_frames(units)
    settings = {**benchmark.settings(), **runner.settings(units)}
    run = RunFolder(out, settings)
    mine = shard_of(benchmark, shard)
    refused = runner.refused([unit for unit in mine if not run.is_done(unit.name)])
    for unit in mine:
        if not run.is_done(unit.name):
            runner.predict(benchmark, unit, run, refused)
        advance()
    if not all(run.is_done(unit.name) for unit in units):
        return None
    run.tidy()
    records = {unit.name: run.record(unit.name) for unit in units}
    outcome = benchmark.outcome(run, records, processes)
    return _written(out, benchmark, runner, settings, records, outcome)


def shard_of(benchmark: Benchmark, shard: Shard) -> list[Unit]:
    """The units of a process's shard."""
    return shard.of(benchmark.units, lambda unit: unit.cost)


def _data_sha256(units: Sequence[Unit]) -> str:
    """SHA-256 over the questions: units, frames and expressions."""
    digest = hashlib.sha256()
    for unit in units:
        asked = [(e.expression_id, e.text) for e in unit.expressions]
        digest.update(repr((unit.name, unit.video.frame_names, asked)).encode())
    return digest.hexdigest()


def _check_frames(units: Sequence[Unit]) -> None:
    """Raise MaskProblemsError with every frame whose file is not there."""
    problems = [
        Problem("frame missing", unit.name, frame)
        for unit in units
        for frame in unit.video.frame_names
        if not unit.dataset.frame_file(unit.video.name, frame).is_file()
    ]
    if problems:
        raise MaskProblemsError(problems, "complete the dataset: see refsam data check")


def _frames(unit: Unit, clock: StageClock) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for frame in unit.video.frame_names:
        with clock.stage("decode"):
            image = unit.dataset.frame(unit.video.name, frame)
        yield frame, image


def _write_pictures(folder: Path, frame: str, pictures: _Pictures) -> None:
    for place, picture in pictures.items():
        path = folder / place / f"{frame}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        encode = encode_mask if picture.dtype == np.bool_ else encode_numbers
        path.write_bytes(encode(picture))


def _written(
    out: Path,
    benchmark: Benchmark,
    runner: Runner,
    settings: Mapping[str, Any],
    records: Mapping[str, _Record],
    outcome: Outcome,
) -> Outcome:
    """Write an outcome's files; return it with what all benchmarks report."""
    speed = speed_summary(records.values())
    made = {**provenance(), "checkpoint": runner.checkpoint, **_hardware(runner.model), **settings}
    rules = (f"protocol: {runner.rules.name}", *runner.rules.notes)
    refused = [
        Problem("expression refused", unit, text)
        for unit, record in records.items()
        for text in record["refused"]
    ]
    remarks = [note for unit in benchmark.units for note in unit.dataset.notes]
    remarks = [*dict.fromkeys(remarks), *describe(refused)]
    stages = tuple(f"{name}: {holds}" for name, holds in STAGES.items())
    sections = [
        *outcome.sections,
        Section("Inference", (Text(rules, listed=True),)),
        *([Section("Data", (Text(tuple(remarks), listed=True),))] if remarks else []),
        Section("Speed", (speed_table(speed), Text(stages, listed=True))),
        provenance_section({name: str(value) for name, value in made.items()}),
    ]
    content = {"benchmark": benchmark.title, **outcome.summary, "inference": list(rules)}
    content |= {"remarks": remarks, "speed": speed, "made": made}
    replace_file(out / "scores.json", as_json(content))
    for name, text in outcome.files.items():
        replace_file(out / name, text)
    write_report(out, benchmark.title, sections)
    lines = [*rules, "", outcome.text, "", *remarks, "", speed_table(speed).markdown()]
    return Outcome("\n".join(lines), content, tuple(sections), outcome.files)


def _hardware(model: PromptedSAM) -> dict[str, str]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"computed on": name, "threads": str(torch.get_num_threads())}
