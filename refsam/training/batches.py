"""The stream of training batches, drawn ahead in other processes where asked: generated clips, or those of datasets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refsam.data import DataError, ReferringDataset, open_dataset
from refsam.data.clips import ClipBatch, ClipMixture, ClipSampler
from refsam.data.generated import generate_batch
from refsam.runtime.signals import ignore_stop_signals
from refsam.training.settings import StageSettings, TrainingSettings

# Height to width of a generated batch's frames.
_ASPECTS = ((9, 16), (9, 16), (9, 16), (3, 4), (1, 1), (16, 9))


@dataclass(frozen=True)
class TrainingBatch:
    """What one step trains on: clips, and for generated ones what is seen at each pixel.

    `attributes (B, T, H, W, 2)` uint8 and `owner (B, T, H, W)` int8 as in `GeneratedBatch`; None for clips of datasets.
    """

    clips: ClipBatch
    attributes: Tensor | None = None
    owner: Tensor | None = None


class GeneratedStream(Dataset[TrainingBatch]):
    """Batch number `index` of a run is drawn from (seed, index) alone; `image_size` is the model's, in pixels.

    A step takes `batches` of them, over all processes and accumulated ones.
    """

    def __init__(self, settings: TrainingSettings, image_size: int, batches: int = 1) -> None:
        self.settings = settings
        self.image_size = image_size
        self.batches = batches

    def __getitem__(self, index: int) -> TrainingBatch:
        stage = stage_at(self.settings.stages, index // self.batches)
        random = np.random.default_rng([self.settings.seed, index])
        aspect = _ASPECTS[random.integers(len(_ASPECTS))]
        long_side = stage.image_size or self.image_size
        height, width = (round(long_side * side / max(aspect)) for side in aspect)
        batch = generate_batch(
            self.settings.seed,
            index,
            clips=stage.clips,
            frames=stage.frames,
            expressions=stage.expressions,
            size=(height, width),
            style=stage.style,
            device="cpu" if self.settings.workers else self.settings.device,
        )
        clips = ClipBatch(
            batch.frames,
            batch.masks,
            ((height, width),) * stage.clips,
            tuple(tuple(sentence.text for sentence in row) for row in batch.sentences),
            colour=None,
            names=tuple(f"generated clip {clip} of batch {index}" for clip in range(stage.clips)),
        )
        return TrainingBatch(clips, batch.attributes, batch.owner)


class DatasetStream(Dataset[TrainingBatch | DataError]):
    """Batch number `index` takes the clips that follow those of the batches before it in an endless mixture of the datasets.

    A step takes `batches` of them, over all processes and accumulated ones. A DataError is handed over, not raised: on its way
    out of another process a raised one would lose its one line.
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
        position = self.batches * _clips_before(self.settings.stages, step) + place * stage.clips
        try:
            clips = [mixture.clip(position + clip) for clip in range(stage.clips)]
        except DataError as error:
            return error
        return TrainingBatch(ClipBatch.of(clips))


def open_datasets(settings: TrainingSettings) -> list[ReferringDataset]:
    """The datasets that a run trains on, none if it draws its own clips; raises DataError."""
    return [
        open_dataset(entry.name, entry.root, entry.split, **entry.options)
        for entry in settings.data.datasets
    ]


def batches(
    stream: GeneratedStream | DatasetStream,
    begin: int,
    end: int,
    workers: int,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[TrainingBatch]:
    """Those of steps `begin` to `end`, the end not included, that fall to one of `ranks` processes.

    In order, drawn ahead by `workers` other processes; raises DataError.
    """
    loader: DataLoader[TrainingBatch | DataError] = DataLoader(
        stream,
        batch_size=None,
        sampler=range(begin * stream.batches + rank, end * stream.batches, ranks),
        num_workers=workers,
        worker_init_fn=_begin_worker,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def stage_at(stages: tuple[StageSettings, ...], step: int) -> StageSettings:
    """The stage that a step belongs to; raises IndexError behind the last."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise IndexError(f"step {step} lies behind the last stage")


def _clips_before(stages: tuple[StageSettings, ...], step: int) -> int:
    """How many clips the steps before this one take where each is one batch."""
    clips = 0
    for stage in stages:
        clips += stage.clips * min(step, stage.steps)
        step -= min(step, stage.steps)
    return clips


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    ignore_stop_signals()
