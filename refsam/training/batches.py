"""The stream of generated batches, drawn ahead in other processes where asked."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from refsam.data.generated import GeneratedBatch, generate_batch
from refsam.training.settings import StageSettings, TrainingSettings

# Height to width of a batch's frames.
_ASPECTS = ((9, 16), (9, 16), (9, 16), (3, 4), (1, 1), (16, 9))


class BatchStream(Dataset[GeneratedBatch]):
    """Batch number `step` of a run is drawn from (seed, step) alone; `image_size` is the model's, in pixels."""

    def __init__(self, settings: TrainingSettings, image_size: int) -> None:
        self.settings = settings
        self.image_size = image_size

    def __getitem__(self, step: int) -> GeneratedBatch:
        stage = stage_at(self.settings.stages, step)
        random = np.random.default_rng([self.settings.seed, step])
        aspect = _ASPECTS[random.integers(len(_ASPECTS))]
        long_side = stage.image_size or self.image_size
        height, width = (round(long_side * side / max(aspect)) for side in aspect)
        return generate_batch(
            self.settings.seed,
            step,
            clips=stage.clips,
            frames=stage.frames,
            expressions=stage.expressions,
            size=(height, width),
            style=stage.style,
            device="cpu" if self.settings.workers else self.settings.device,
        )

    def batches(self, begin: int, end: int) -> Iterator[GeneratedBatch]:
        """Those of steps `begin` to `end`, the end not included, in order."""
        loader: DataLoader[GeneratedBatch] = DataLoader(
            self,
            batch_size=None,
            sampler=range(begin, end),
            num_workers=self.settings.workers,
            worker_init_fn=_use_one_thread,
        )
        return iter(loader)


def stage_at(stages: tuple[StageSettings, ...], step: int) -> StageSettings:
    """The stage that a step belongs to; raises IndexError behind the last."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise IndexError(f"step {step} lies behind the last stage")


def _use_one_thread(_: int) -> None:
    torch.set_num_threads(1)
