"""The training loop: generated batches, truncated back-propagation over clips, resumable state."""

import copy
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from refsam.config import RefSAMConfig, config_from_dict
from refsam.data.generated import GeneratedBatch
from refsam.data.generated.grammar import vocabulary
from refsam.errors import UserError
from refsam.model import FrameSize, ImageFeatures, RefSAM, word_tokenizer
from refsam.training.batches import BatchStream, stage_at
from refsam.training.losses import mask_losses
from refsam.training.objects import ObjectHead
from refsam.training.parameters import build_optimisers, learning_rate, update_average
from refsam.training.settings import StageSettings, TrainingSettings


class Trainer:
    """Trains one model from settings; `run` yields one record of losses and speed for every `log_every` steps.

    The output folder holds `log.jsonl`, `state.pt` (model, average, optimiser, step: what `run` resumes from; the previous
    one as `state.previous.pt`) and, at the end, the averaged model as `model/`.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        self.settings = settings
        self.output = Path(settings.output)
        self.output.mkdir(parents=True, exist_ok=True)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.model = _build_model(settings).to(settings.device)
        self.model.train()
        config = self.model.config
        self.head = ObjectHead(config.prompt_dim, config.image_encoder.patch_size)
        self.head.to(settings.device)
        self.optimisers = build_optimisers(
            nn.ModuleList([self.model, *([self.head] if settings.loss.objects else [])]),
            settings.optimiser,
        )
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step = 0
        self.steps = sum(stage.steps for stage in settings.stages)

    def run(self) -> Iterator[dict[str, float]]:
        """Train from the last saved step to the end; raises UserError where the loss stops being a number."""
        self.resume()
        sums: dict[str, float] = {}
        begin = time.perf_counter()
        stream = BatchStream(self.settings, self.model.image_size)
        for batch in stream.batches(self.step, self.steps):
            losses = self.train_step(batch)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            if self.step % self.settings.log_every == 0:
                seconds = (time.perf_counter() - begin) / self.settings.log_every
                record = {name: value / self.settings.log_every for name, value in sums.items()}
                yield self._log(record | {"step": self.step, "seconds_per_step": seconds})
                sums, begin = {}, time.perf_counter()
            if self.step % self.settings.save_every == 0 or self.step == self.steps:
                self.save()
        self.averaged_model().save_pretrained(self.output / "model")

    def train_step(self, batch: GeneratedBatch) -> dict[str, float]:
        """One step on a batch; returns its losses before the step."""
        stage = stage_at(self.settings.stages, self.step)
        rate = learning_rate(self.step, self.steps, self.settings.optimiser)
        for group in (group for each in self.optimisers for group in each.param_groups):
            group["lr"] = rate
        losses = self._losses(batch, stage)
        values = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(values["total"]):
            raise self._stop("loss")
        self.model.zero_grad(set_to_none=True)
        self.head.zero_grad(set_to_none=True)
        losses["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.settings.optimiser.clip_norm
        )
        for optimiser in self.optimisers:
            optimiser.step()
        update_average(
            self.average, self.model.state_dict(), self.settings.optimiser.average, self.step
        )
        self.step += 1
        return values | {"gradient_norm": float(norm), "learning_rate": rate}

    def _losses(self, batch: GeneratedBatch, stage: StageSettings) -> dict[str, Tensor]:
        """Mean losses over the frames of a clip, and their weighted sum as `total`."""
        frames, attributes, owner = (
            tensor.flatten(0, 1).to(self.settings.device, non_blocking=True)
            for tensor in (batch.frames, batch.attributes, batch.owner)
        )
        losses: dict[str, Tensor] = {}
        with self._autocast():
            pixels, size = self.model.preprocess(frames, stage.image_size)
            image = self.model.encode_image(pixels)
            if stage.expressions:
                losses = self._mask_losses(image, batch, size, stage)
            total = [getattr(self.settings.loss, name) * value for name, value in losses.items()]
            if self.settings.loss.objects:
                objects = self.head(image, attributes, owner)
                total.append(self.settings.loss.objects * torch.stack(list(objects.values())).sum())
                losses |= objects
        return losses | {"total": torch.stack(total).sum()}

    def _mask_losses(
        self, image: ImageFeatures, batch: GeneratedBatch, size: FrameSize, stage: StageSettings
    ) -> dict[str, Tensor]:
        """Means over a clip's frames; each frame's track tokens go into the next."""
        clips, frames = batch.frames.shape[:2]
        masks = batch.masks.flatten(0, 1).to(self.settings.device, non_blocking=True)
        clip_index = torch.arange(clips, device=masks.device).repeat_interleave(stage.expressions)
        image_size = stage.image_size or self.model.image_size
        text = self.model.encode_text([s.text for row in batch.sentences for s in row])
        track, steps = None, []
        for t in range(frames):
            output = self.model.decode(image, text, clip_index * frames + t, track)
            if not output.logits.isfinite().all():
                raise self._stop("predicted mask")
            track = output.track_token
            loss = self.settings.loss
            steps.append(mask_losses(output, masks[:, t], size, image_size, loss, stage.loss_scale))
        return {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}

    def _stop(self, what: str) -> UserError:
        saved = self.step - self.step % self.settings.save_every
        return UserError(
            f"the {what} is not a number at step {self.step} (seed {self.settings.seed}); the state of step {saved} is kept "
            f"in {self.output}: lower optimiser.learning_rate"
        )

    def _autocast(self) -> Any:
        if self.settings.dtype == "float32":
            return nullcontext()
        return torch.autocast(
            self.settings.device.split(":")[0], getattr(torch, self.settings.dtype)
        )

    def averaged_model(self) -> RefSAM:
        """A copy of the model in eval mode with the averaged weights."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average)
        return model.eval()

    def save(self) -> None:
        """Write the resumable state; the one before stays as `state.previous.pt`."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "head": self.head.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
        }
        path = self.output / "state.pt"
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        if path.exists():
            os.replace(path, self.output / "state.previous.pt")
        os.replace(temporary, path)

    def resume(self) -> None:
        """Load the newest state that can be read, if there is one."""
        for name in ("state.pt", "state.previous.pt"):
            path = self.output / name
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location=self.settings.device, weights_only=True)
            except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
                self._log({"step": self.step, "damaged": f"{path}: {error}"})
                continue
            self.model.load_state_dict(state["model"])
            self.head.load_state_dict(state["head"])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.average, self.step = state["average"], state["step"]
            return

    def _log(self, record: dict[str, Any]) -> dict[str, Any]:
        with open(self.output / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record


def _build_model(settings: TrainingSettings) -> RefSAM:
    if settings.start is not None:
        return RefSAM.from_pretrained(settings.start)
    values = dict(settings.model)
    preset = values.pop("preset", None)
    config = RefSAMConfig.preset(preset) if preset else config_from_dict(RefSAMConfig, values)
    return RefSAM(config, tokenizer=word_tokenizer(vocabulary()))
