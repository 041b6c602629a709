"""The training loop: batches, truncated back-propagation over clips, resumable state."""

import copy
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refsam.config import RefSAMConfig, config_from_dict
from refsam.data import ReferringDataset
from refsam.data.clips import ClipBatch
from refsam.data.colour import adjust_colour
from refsam.data.generated.grammar import vocabulary
from refsam.errors import UserError
from refsam.model import FrameSize, ImageFeatures, MaskOutput, RefSAM, word_tokenizer
from refsam.training.batches import (
    DatasetStream,
    GeneratedStream,
    TrainingBatch,
    batches,
    open_datasets,
    stage_at,
)
from refsam.training.losses import mask_losses
from refsam.training.objects import ObjectHead
from refsam.training.parameters import build_optimisers, learning_rate, update_average
from refsam.training.settings import StageSettings, TrainingSettings

# How many samples an error message names.
_NAMED = 4


class SizeGroup(NamedTuple):
    """Clips `begin` to `end` of a batch, the end not included, whose frames have one size."""

    begin: int
    end: int
    size: FrameSize


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
        self.datasets = open_datasets(settings)
        self.notes = [note for dataset in self.datasets for note in dataset.notes]
        self.model = _build_model(settings, self.datasets).to(settings.device)
        self.model.train()
        config = self.model.config
        self.head = ObjectHead(config.prompt_dim, config.image_encoder.patch_size)
        self.head.to(settings.device)
        self.optimisers = build_optimisers(
            nn.ModuleList([self.model, self.head]), settings.optimiser
        )
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step = 0
        self.unreadable = 0
        self.steps = sum(stage.steps for stage in settings.stages)

    def run(self) -> Iterator[dict[str, float]]:
        """Train from the last saved step to the end; raises UserError where the loss stops being a number."""
        self.resume()
        sums: dict[str, float] = {}
        begin = time.perf_counter()
        stream = (
            DatasetStream(self.settings, self.datasets)
            if self.datasets
            else GeneratedStream(self.settings, self.model.image_size)
        )
        if self.notes:
            self._log({"step": self.step, "data": self.notes})
        for batch in batches(stream, self.step, self.steps, self.settings.workers):
            losses = self.train_step(batch)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            if self.step % self.settings.log_every == 0:
                seconds = (time.perf_counter() - begin) / self.settings.log_every
                record = {name: value / self.settings.log_every for name, value in sums.items()}
                record |= {"step": self.step, "seconds_per_step": seconds}
                if self.unreadable:
                    record["unreadable"] = self.unreadable
                yield self._log(record)
                sums, begin = {}, time.perf_counter()
            if self.step % self.settings.save_every == 0 or self.step == self.steps:
                self.save()
        self.averaged_model().save_pretrained(self.output / "model")

    def train_step(self, batch: TrainingBatch) -> dict[str, float]:
        """One step on a batch; returns its losses before the step."""
        stage = stage_at(self.settings.stages, self.step)
        rate = learning_rate(self.step, self.steps, self.settings.optimiser)
        for group in (group for each in self.optimisers for group in each.param_groups):
            group["lr"] = rate * group.get("scale", 1.0)  # states of earlier versions lack it
        losses = self._losses(batch, stage)
        values = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(values["total"]):
            raise self._stop("loss", batch.clips.names)
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
        if batch.clips.skipped:
            self.unreadable += len(batch.clips.skipped)
            self._log({"step": self.step, "skipped": batch.clips.skipped})
        return values | {"gradient_norm": float(norm), "learning_rate": rate}

    def _losses(self, batch: TrainingBatch, stage: StageSettings) -> dict[str, Tensor]:
        """Mean losses over the frames of a clip, and their weighted sum as `total`."""
        losses: dict[str, Tensor] = {}
        frames = self._on_device(batch.clips.frames)
        if batch.clips.colour is not None:
            frames = adjust_colour(frames, batch.clips.colour, batch.clips.sizes)
        with self._autocast():
            pixels, groups = self._preprocess(frames, batch.clips.sizes, stage.image_size)
            image = self.model.encode_image(pixels)
            if stage.expressions:
                losses = self._mask_losses(image, batch.clips, groups, stage)
            total = [getattr(self.settings.loss, name) * value for name, value in losses.items()]
            if (
                batch.attributes is not None
                and batch.owner is not None
                and self.settings.loss.objects
            ):
                seen = (self._on_device(t.flatten(0, 1)) for t in (batch.attributes, batch.owner))
                objects = self.head(image, *seen)
                total.append(self.settings.loss.objects * torch.stack(list(objects.values())).sum())
                losses |= objects
        return losses | {"total": torch.stack(total).sum()}

    def _preprocess(
        self, frames: Tensor, sizes: Sequence[tuple[int, int]], image_size: int | None
    ) -> tuple[Tensor, list[SizeGroup]]:
        """Pixels (B * T, 3, S, S) of frames (B, T, H, W, 3), and the stretches of clips of one size."""
        groups, pixels, begin = [], [], 0
        for (height, width), clips in groupby(sizes):
            end = begin + len(list(clips))
            part = frames[begin:end, :, :height, :width].flatten(0, 1)
            prepared, size = self.model.preprocess(part, image_size)
            groups.append(SizeGroup(begin, end, size))
            pixels.append(prepared)
            begin = end
        return torch.cat(pixels), groups

    def _mask_losses(
        self, image: ImageFeatures, clips: ClipBatch, groups: list[SizeGroup], stage: StageSettings
    ) -> dict[str, Tensor]:
        """Means over a clip's frames; each frame's track tokens go into the next."""
        count, frames = clips.frames.shape[:2]
        masks = self._on_device(clips.masks.flatten(0, 1))
        clip_index = torch.arange(count, device=masks.device).repeat_interleave(stage.expressions)
        text = self.model.encode_text([text for row in clips.texts for text in row])
        track, steps = None, []
        for t in range(frames):
            output = self.model.decode(image, text, clip_index * frames + t, track)
            finite = output.logits.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                wrong = sorted(set(clip_index[~finite].tolist()))
                raise self._stop("predicted mask", [clips.names[index] for index in wrong])
            track = output.track_token
            steps.append(self._frame_losses(output, masks[:, t], groups, stage))
        return {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}

    def _frame_losses(
        self, output: MaskOutput, masks: Tensor, groups: list[SizeGroup], stage: StageSettings
    ) -> dict[str, Tensor]:
        """Means over the expressions of one frame of every clip, whose masks (P, H, W) are padded to the largest."""
        image_size = stage.image_size or self.model.image_size
        losses: dict[str, Tensor] = {}
        for group in groups:
            rows = slice(group.begin * stage.expressions, group.end * stage.expressions)
            height, width = group.size.original
            part = mask_losses(
                output._replace(logits=output.logits[rows], iou=output.iou[rows]),
                masks[rows, :height, :width],
                group.size,
                image_size,
                self.settings.loss,
                stage.loss_scale,
            )
            if self.settings.loss.target:
                part["target"] = self.head.targets(
                    output.object_token[rows], masks[rows, :height, :width]
                )
            share = (group.end - group.begin) / groups[-1].end
            for name, value in part.items():
                losses[name] = losses[name] + share * value if name in losses else share * value
        return losses

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.settings.device, non_blocking=True)

    def _stop(self, what: str, names: Sequence[str]) -> UserError:
        saved = self.step - self.step % self.settings.save_every
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return UserError(
            f"the {what} is not a number at step {self.step} (seed {self.settings.seed}), on {'; '.join(names[:_NAMED])}{more}; "
            f"the state of step {saved} is kept in {self.output}: lower optimiser.learning_rate, or look at the data"
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


def _build_model(settings: TrainingSettings, datasets: Sequence[ReferringDataset]) -> RefSAM:
    if settings.start is not None:
        return RefSAM.from_pretrained(settings.start)
    values = dict(settings.model)
    preset = values.pop("preset", None)
    config = RefSAMConfig.preset(preset) if preset else config_from_dict(RefSAMConfig, values)
    return RefSAM(config, tokenizer=word_tokenizer([*vocabulary(), *_words(datasets)]))


def _words(datasets: Sequence[ReferringDataset]) -> list[str]:
    """What a small text encoder that starts from nothing must know beside the generated sentences."""
    texts = (e.text for dataset in datasets for row in dataset.sentences.values() for e in row)
    return sorted({word for text in texts for word in re.findall(r"\w+", text.lower())})
