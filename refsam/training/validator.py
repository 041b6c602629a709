"""Validation during training: scores the averaged model, keeps the best models, draws examples."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from refsam.training.checkpointing import Weights
from refsam.training.distributed import SharedModule
from refsam.training.monitoring import Log
from refsam.training.settings import TrainingSettings
from refsam.training.state import Progress
from refsam.training.validation import ValidationClips, score_clips


@dataclass(frozen=True)
class Validator:
    """Scores the averaged model on `clips`; every process must take part.

    The best model is saved as `best/` in the output folder, the `validation.keep` best below `top/`.
    """

    settings: TrainingSettings
    clips: ValidationClips
    weights: Weights
    shared: SharedModule

    def run(self, progress: Progress, log: Log, skipped: list[str]) -> dict[str, float]:
        """The record of J, F and J&F at this step, empty where no clip can be read.

        Adds unreadable clips to `skipped` if the settings allow that, else raises UnreadableError.
        """
        processes, model = self.weights.processes, self.weights.model
        is_sharded = self.settings.parallel == "fsdp"
        # Sharded weights are gathered frame by frame, so every process must go through the same frames.
        begin, every = (0, 1) if is_sharded else (processes.rank, processes.count)

        may_skip = self.settings.data.unreadable == "skip"
        with self.weights.averaged(), self.shared.gathered():
            model.eval()
            order = range(begin, len(self.clips), every)
            draw = partial(self._draw, progress.step, log)
            own = score_clips(model, self.clips, order, draw, skipped if may_skip else None)
            model.train()
        rows = own if is_sharded else [row for part in processes.gather(own) for row in part]
        if not rows:
            return {}
        region, contour = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
        score = (region + contour) / 2
        self._rank(progress, score)
        return {"step": progress.step, "J": region, "F": contour, "J&F": score}

    def _rank(self, progress: Progress, score: float) -> None:
        """Save the model if its score is the best, or among the `keep` best."""
        keep, step, is_delta = self.settings.validation.keep, progress.step, self.settings.delta
        progress.validated = step
        progress.worse += 1
        if progress.best is None or score > progress.best:
            progress.best, progress.best_step, progress.worse = score, step, 0
            self.weights.save_model(Path(self.settings.output) / "best", is_delta)
        if keep == 1:
            return
        ranked = sorted([*progress.top, (score, step)], reverse=True)
        progress.top = ranked[:keep]
        if (score, step) in progress.top:
            self.weights.save_model(self._top(step), is_delta)
        for _, left in ranked[keep:]:
            if self.weights.processes.is_first:
                shutil.rmtree(self._top(left), ignore_errors=True)

    def _top(self, step: int) -> Path:
        return Path(self.settings.output) / "top" / f"{step:06d}"

    def _draw(self, step: int, log: Log, index: int, image: NDArray[np.uint8]) -> None:
        if index >= self.settings.validation.examples or not self.weights.processes.is_first:
            return
        folder = Path(self.settings.output) / "examples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{step:06d}_{index:02d}.png")
        log.picture(f"example_{index:02d}", image, step)
