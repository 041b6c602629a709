"""The stream of training batches, drawn ahead in other processes where asked: generated clips, or those of datasets."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from refsam.data import DataError, ReferringDataset
from refsam.data.clips import ClipBatch, ClipMixture, ClipSampler
from refsam.data.generated import generate_batch
from refsam.data.photographs.clips import photograph_batch
from refsam.data.photographs.folder import open_folder
from refsam.data.photographs.scenes import SceneDrawer
from refsam.training.loading import draw
from refsam.training.settings import PhotographSettings, StageSettings, TrainingSettings

# Height to width of a generated batch's frames.
_ASPECTS = ((9, 16), (9, 16), (9, 16), (3, 4), (1, 1), (16, 9))
# The same for photographs, which are upright as often as wide.
_PHOTOGRAPH_ASPECTS = ((9, 16), (9, 16), (3, 4), (3, 4), (1, 1), (4, 3), (16, 9))


@dataclass(frozen=True)
class TrainingBatch:
    """A step's clips, and for generated clips the attributes of each pixel.

    `attributes (B, T, H, W, 2)` uint8 and `owner (B, T, H, W)` int8 as in `GeneratedBatch`; None for clips of datasets.
    """

    clips: ClipBatch
    attributes: Tensor | None = None
    owner: Tensor | None = None


@dataclass(frozen=True)
class GeneratedStream(Dataset[TrainingBatch | DataError]):
    """Draws batch number `index` of a run from (seed, index) only; `image_size` is the model's, in pixels.

    A batch is either made of photographs by `drawer` or generated, in the proportion that the stage sets. A step takes
    `batches` batches, over all processes and accumulation. A DataError is returned, as by `DatasetStream`.
    """

    settings: TrainingSettings
    image_size: int
    batches: int = 1
    drawer: SceneDrawer | None = None

    def __getitem__(self, index: int) -> TrainingBatch | DataError:
        stage = stage_at(self.settings.stages, index // self.batches)
        random = np.random.default_rng([self.settings.seed, index])
        aspect = _ASPECTS[random.integers(len(_ASPECTS))]
        takes_photographs = self.drawer is not None and random.random() < stage.photographs
        drawer = self.drawer if takes_photographs else None
        if drawer is not None:
            aspect = _PHOTOGRAPH_ASPECTS[random.integers(len(_PHOTOGRAPH_ASPECTS))]
        size = _size_of(stage.image_size or self.image_size, aspect)
        counts: dict[str, Any] = {
            "clips": stage.clips,
            "frames": stage.frames,
            "expressions": stage.expressions,
        }
        if drawer is not None:
            try:
                return TrainingBatch(
                    photograph_batch(drawer, self.settings.seed, index, **counts, size=size)
                )
            except DataError as error:
                return error
        device = "cpu" if self.settings.workers else self.settings.device
        batch = generate_batch(
            self.settings.seed, index, **counts, size=size, style=stage.style, device=device
        )
        clips = ClipBatch(
            batch.frames,
            batch.masks,
            (size,) * stage.clips,
            tuple(tuple(each.text for each in row) for row in batch.expressions),
            colour=None,
            names=tuple(f"generated clip {clip} of batch {index}" for clip in range(stage.clips)),
        )
        return TrainingBatch(clips, batch.attributes, batch.owner)

    def course(self, step: int) -> dict[str, float]:
        """Clips seen before a step."""
        return {"samples": self.batches * clips_before(self.settings.stages, step)}


class DatasetStream(Dataset[TrainingBatch | DataError]):
    """Makes batch number `index` from an endless mixture of the datasets' clips.

    A step takes `batches` batches, over all processes and accumulation. A DataError is returned, not raised: raised
    in another process, it would lose its one-line message.
    """

    def __init__(
        self, settings: TrainingSettings, datasets: Sequence[ReferringDataset], batches: int = 1
    ) -> None:
        self.settings = settings
        self.batches = batches
        data = settings.data
        self.mixtures = {
            (stage.frames, stage.expressions): ClipMixture(
                [
                    ClipSampler(
                        dataset, stage.frames, stage.expressions, data.augmentation, data.unreadable
                    )
                    for dataset in datasets
                ],
                [entry.weight for entry in data.datasets],
                settings.seed,
            )
            for stage in settings.stages
        }

    def __getitem__(self, index: int) -> TrainingBatch | DataError:
        step, place = divmod(index, self.batches)
        stage = stage_at(self.settings.stages, step)
        mixture = self.mixtures[stage.frames, stage.expressions]
        position = self.batches * clips_before(self.settings.stages, step) + place * stage.clips
        try:
            clips = [mixture.clip(position + clip) for clip in range(stage.clips)]
        except DataError as error:
            return error
        return TrainingBatch(ClipBatch.of(clips))

    def course(self, step: int) -> dict[str, float]:
        """Clips and passes over the datasets before a step; passes are those of the previous step's stage."""
        seen = self.batches * clips_before(self.settings.stages, step)
        stage = stage_at(self.settings.stages, max(0, step - 1))
        return {
            "samples": seen,
            "epoch": seen / len(self.mixtures[stage.frames, stage.expressions]),
        }


def open_stream(
    settings: TrainingSettings,
    datasets: Sequence[ReferringDataset],
    image_size: int,
    batches: int = 1,
    drawer: SceneDrawer | None = None,
) -> GeneratedStream | DatasetStream:
    """The stream of a run's batches; the arguments are those of the two streams."""
    if datasets:
        return DatasetStream(settings, datasets, batches)
    return GeneratedStream(settings, image_size, batches, drawer)


def with_steps(
    settings: TrainingSettings, datasets: Sequence[ReferringDataset], processes: int
) -> TrainingSettings:
    """The settings with each stage's `steps` reduced to those that its `epochs` take."""
    if not any(stage.epochs for stage in settings.stages):
        return settings
    together = settings.optimiser.gradient_accumulation_steps * processes
    mixtures = DatasetStream(settings, datasets).mixtures
    stages = []
    for stage in settings.stages:
        passes = stage.epochs or math.inf
        samples = passes * len(mixtures[stage.frames, stage.expressions])
        steps = min(stage.steps, max(1, samples / (stage.clips * together)))
        stages.append(replace(stage, steps=math.ceil(steps)))
    return replace(settings, stages=tuple(stages))


def open_photographs(settings: PhotographSettings | None) -> SceneDrawer | None:
    """The generator of clips from a folder of photographs, None without one; raises DataError."""
    if settings is None:
        return None
    if not Path(settings.root).is_dir():
        raise DataError(
            f"data.photographs.root: no folder {settings.root}; give yours with data.photographs.root=FOLDER, laid out as "
            "docs/data.md says, or train on generated clips alone: photographs: 0 in every stage and data.photographs=null"
        )
    return SceneDrawer(
        open_folder(settings.root, settings.split),
        settings.composites,
        settings.balance,
        settings.only_cut_out,
        settings.cached,
    )


def batches(
    stream: GeneratedStream | DatasetStream,
    begin: int,
    end: int,
    workers: int,
    rank: int = 0,
    ranks: int = 1,
    pin: bool = False,
) -> Iterator[TrainingBatch]:
    """Yield the batches of steps `begin` to `end`, the end excluded, of one of `ranks` processes.

    `workers` other processes draw them ahead, in order; see `refsam.training.loading`. Raises DataError and UserError.
    """
    order = range(begin * stream.batches + rank, end * stream.batches, ranks)
    for batch in draw(stream, order, workers, pin):
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _size_of(long_side: int, aspect: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels with that ratio and that longer side."""
    height, width = (round(long_side * side / max(aspect)) for side in aspect)
    return height, width


def stage_at(stages: tuple[StageSettings, ...], step: int) -> StageSettings:
    """The stage that a step belongs to; raises IndexError behind the last."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise IndexError(f"step {step} lies behind the last stage")


def clips_before(stages: tuple[StageSettings, ...], step: int) -> int:
    """Number of clips of the steps before this one, with one batch each."""
    clips = 0
    for stage in stages:
        clips += stage.clips * min(step, stage.steps)
        step -= min(step, stage.steps)
    return clips
