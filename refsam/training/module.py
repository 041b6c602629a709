"""The trained modules as one, with the losses of a batch as its forward; several processes share it."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refsam.data.clips import ClipBatch
from refsam.data.colour import adjust_colour
from refsam.model import FrameSize, ImageFeatures, MaskOutput, RefSAM, TextPrompt
from refsam.runtime.device import autocast
from refsam.training.auxiliary_losses import ObjectHead
from refsam.training.batches import TrainingBatch
from refsam.training.losses import mask_losses
from refsam.training.noun_loss import NounLoss
from refsam.training.settings import StageSettings, TrainingSettings
from refsam.training.text_features import TextFeatures


class NotANumberError(ValueError):
    """A loss or mask is NaN or infinite; `names` are the samples that it was computed on."""

    def __init__(self, what: str, names: Sequence[str]) -> None:
        super().__init__(what)
        self.what = what
        self.names = tuple(names)


class Broken:
    """Collects samples whose results are NaN or infinite on the device, and checks them once a step.

    Each check waits for a GPU. On a CPU it is free, so the first bad result raises at once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._found: list[tuple[str, Tensor]] = []

    def add(self, what: str, samples: Tensor) -> None:
        """Add a result's name and which samples of it are bad, (B,) bool."""
        self._found.append((what, samples))
        if is_free_to_look_at(samples):
            self.refuse()

    def refuse(self) -> None:
        """Raise NotANumberError for the first bad result; one synchronisation if there is none."""
        found, self._found = self._found, []
        if not found or not torch.stack([samples for _, samples in found]).any():
            return
        for what, samples in found:
            if wrong := samples.nonzero().flatten().tolist():
                raise NotANumberError(what, [self._names[index] for index in wrong])


def is_free_to_look_at(tensor: Tensor) -> bool:
    """Whether reading the tensor's values waits for no device."""
    return tensor.device.type == "cpu"


class SizeGroup(NamedTuple):
    """Clips `begin` to `end` of a batch, the end not included, whose frames have one size."""

    begin: int
    end: int
    size: FrameSize


class TrainingModule(nn.Module):
    """The model and the heads that only training needs; `features` holds the outputs of a frozen text encoder."""

    def __init__(self, model: RefSAM, settings: TrainingSettings) -> None:
        super().__init__()
        self.settings = settings
        self.model = model
        self.head = ObjectHead(model.config.prompt_dim, model.config.image_encoder.patch_size)
        has_nouns = settings.loss.nouns and model.noun_match is not None
        self.nouns = NounLoss(model) if has_nouns else None
        is_trained = any(p.requires_grad for p in model.text_encoder.parameters())
        self.features = (
            None if is_trained else TextFeatures(model.text_encoder, settings.text_cache)
        )

    def forward(self, batch: TrainingBatch, stage: StageSettings) -> dict[str, Tensor]:
        """Mean losses over the frames of a clip, and their weighted sum as `total`; raises NotANumberError."""
        losses: dict[str, Tensor] = {}
        broken = Broken(batch.clips.names)
        frames = self._on_device(batch.clips.frames)
        if batch.clips.colour is not None:
            frames = adjust_colour(frames, batch.clips.colour, batch.clips.sizes)
        with autocast(self.model.device, getattr(torch, self.settings.dtype)):
            pixels, groups = self._preprocess(frames, batch.clips.sizes, stage.image_size)
            image = self.model.encode_image(pixels)
            if stage.expressions:
                losses = self._mask_losses(image, batch.clips, groups, stage, broken)
                if self.nouns is not None:
                    losses["nouns"] = self.nouns(self.model)
            total = [getattr(self.settings.loss, name) * value for name, value in losses.items()]
            if batch.attributes is not None and self.settings.loss.objects:
                assert batch.owner is not None
                seen = (self._on_device(t.flatten(0, 1)) for t in (batch.attributes, batch.owner))
                objects = self.head(image, *seen)
                total.append(self.settings.loss.objects * torch.stack(list(objects.values())).sum())
                losses |= objects
        losses["total"] = torch.stack(total).sum()
        broken.add("loss", ~losses["total"].isfinite().expand(len(batch.clips.names)))
        broken.refuse()
        return losses

    def _preprocess(
        self, frames: Tensor, sizes: Sequence[tuple[int, int]], image_size: int | None
    ) -> tuple[Tensor, list[SizeGroup]]:
        """Pixels (B * T, 3, h, w) of frames (B, T, H, W, 3), filled up to the largest, and the stretches of clips of one size."""
        groups, pixels, begin = [], [], 0
        for (height, width), clips in groupby(sizes):
            end = begin + len(list(clips))
            part = frames[begin:end, :, :height, :width].flatten(0, 1)
            prepared, size = self.model.preprocess(part, image_size)
            groups.append(SizeGroup(begin, end, size))
            pixels.append(prepared)
            begin = end
        height, width = (max(part.shape[side] for part in pixels) for side in (2, 3))
        filled = (F.pad(p, (0, width - p.shape[3], 0, height - p.shape[2])) for p in pixels)
        return torch.cat(list(filled)), groups

    def _encode_text(self, texts: Sequence[str]) -> TextPrompt:
        if self.features is None:
            return self.model.encode_text(texts)
        return self.model.project_text(self.features(texts))

    def _mask_losses(
        self,
        image: ImageFeatures,
        clips: ClipBatch,
        groups: list[SizeGroup],
        stage: StageSettings,
        broken: "Broken",
    ) -> dict[str, Tensor]:
        """Means over a clip's frames; each frame's track tokens go into the next."""
        count, frames = clips.frames.shape[:2]
        masks = self._on_device(clips.masks.flatten(0, 1))
        ignore = None if clips.ignore is None else self._on_device(clips.ignore.flatten(0, 1))
        clip_index = torch.arange(count, device=masks.device).repeat_interleave(stage.expressions)
        text = self._encode_text([text for row in clips.texts for text in row])
        track, steps = None, []
        for t in range(frames):
            if track is not None and stage.tbptt_frames and t % stage.tbptt_frames == 0:
                track = track.detach()
            output = self.model.decode(image, text, clip_index * frames + t, track)
            of_clips = output.logits.isfinite().unflatten(0, (count, -1)).flatten(1)
            broken.add("predicted mask", ~of_clips.all(dim=1))
            track = output.track_token
            unknown = None if ignore is None else ignore[:, t]
            steps.append(self._frame_losses(output, masks[:, t], unknown, groups, stage))
        return {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}

    def _frame_losses(
        self,
        output: MaskOutput,
        masks: Tensor,
        ignore: Tensor | None,
        groups: list[SizeGroup],
        stage: StageSettings,
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
                None if ignore is None else ignore[rows, :height, :width],
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
        return tensor.to(self.model.device, non_blocking=True)
