"""J and F of the model during training, on clips that it is not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from refsam.data import DataError, ReferringDataset, VideoRecord, open_dataset
from refsam.data.dataset import UnreadableError
from refsam.data.generated import generate_clip
from refsam.errors import ExpressionError
from refsam.metrics import contour_accuracy, region_similarity
from refsam.model import RefSAM
from refsam.session import VideoSession
from refsam.training.settings import ValidationSettings
from refsam.video.overlay import draw_overlay

# Far from the seeds of the frozen benchmark, which nothing may be chosen by.
_SEED = 3_000_000
_KINDS = (("colour", "absent"), ("shape", "absent"), ("colour and shape", "position"))


@dataclass(frozen=True)
class ValidationClip:
    """Frames (T, H, W, 3) uint8 RGB, E expressions and their masks (E, T, H, W) bool."""

    frames: NDArray[np.uint8]
    texts: tuple[str, ...]
    masks: NDArray[np.bool_]


class ValidationClips(Protocol):
    """Clips by number, read or drawn on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ValidationClip: ...


class GeneratedClips:
    """Clips of colours, shapes and expressions that training never draws."""

    def __init__(self, settings: ValidationSettings, image_size: int) -> None:
        self.settings = settings
        self.size = (9 * image_size // 16, image_size)

    def __len__(self) -> int:
        return self.settings.clips

    def __getitem__(self, index: int) -> ValidationClip:
        clip = generate_clip(
            _SEED + index,
            frames=self.settings.frames or 1,
            size=self.size,
            kinds=_KINDS[index % len(_KINDS)],
            held_out=True,
        )
        return ValidationClip(clip.frames.numpy(), tuple(clip.expressions), clip.masks.numpy())


class DatasetClips:
    """The first annotated frames of videos spread evenly over a dataset, with all of their expressions."""

    def __init__(self, settings: ValidationSettings, dataset: ReferringDataset) -> None:
        if dataset.mask_source is None:
            raise DataError(
                f"validation.dataset: the masks of {dataset.name} {dataset.split} are not there, want a split that has them"
            )
        self.frames = settings.frames
        self.dataset = dataset
        videos = [video for video in dataset.videos if video.annotated]
        if not videos:
            raise DataError(
                f"validation.dataset: no frame of {dataset.name} {dataset.split} has a mask"
            )
        count = min(settings.clips, len(videos))
        self.videos = [videos[index * len(videos) // count] for index in range(count)]
        if settings.most_frames is not None:
            self.videos = self._within(settings.most_frames)

    def _within(self, most_frames: int) -> list[VideoRecord]:
        """As many videos, spread evenly, as have at most `most_frames` frames in all; at least one."""
        for count in range(len(self.videos), 1, -1):
            chosen = [self.videos[index * len(self.videos) // count] for index in range(count)]
            if sum(len(video.annotated[: self.frames]) for video in chosen) <= most_frames:
                return chosen
        return self.videos[:1]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> ValidationClip:
        video = self.videos[index]
        names = video.annotated[: self.frames]
        expressions = self.dataset.expressions(video.name)
        masks = [[self.dataset.mask(each, name) for name in names] for each in expressions]
        return ValidationClip(
            np.stack([self.dataset.frame(video.name, name) for name in names]),
            tuple(each.text for each in expressions),
            np.array(masks, dtype=bool),
        )


def open_clips(settings: ValidationSettings, image_size: int) -> ValidationClips | None:
    """The validation clips of a run, None without validation; `image_size` is the model's, in pixels. Raises DataError."""
    if settings.every is None:
        return None
    entry = settings.dataset
    if entry is None:
        return GeneratedClips(settings, image_size)
    return DatasetClips(
        settings, open_dataset(entry.name, entry.root, entry.split, **entry.options)
    )


def score_clips(
    model: RefSAM,
    clips: ValidationClips,
    indices: Sequence[int],
    picture: Callable[[int, NDArray[np.uint8]], None] = lambda index, image: None,
    skipped: list[str] | None = None,
) -> list[tuple[float, float]]:
    """(J, F) of every expression of those clips, means over its frames; the model is in eval mode.

    An expression that the text encoder cannot take gets empty masks. `picture` gets, for each clip, its last frame with the
    predicted masks and, beside it, with the true ones. An unreadable clip is noted in `skipped`; without that list
    UnreadableError is raised.
    """
    scores = []
    for index in indices:
        try:
            clip = clips[index]
        except UnreadableError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        predicted = predict(model, clip)
        for found, truth in zip(predicted, clip.masks, strict=True):
            region, contour = region_similarity(found, truth), contour_accuracy(found, truth)
            scores.append((float(region.mean()), float(contour.mean())))
        pair = [
            draw_overlay(clip.frames[-1], masks[:, -1], clip.texts)
            for masks in (predicted, clip.masks)
        ]
        picture(index, np.concatenate(pair, axis=1))
    return scores


@torch.no_grad()
def predict(model: RefSAM, clip: ValidationClip) -> NDArray[np.bool_]:
    """The masks (E, T, H, W) that the model finds online."""
    understood = [place for place, text in enumerate(clip.texts) if _is_understood(model, text)]
    predicted = np.zeros_like(clip.masks)
    session = VideoSession(model, [clip.texts[place] for place in understood], optimize=False)
    for time, frame in enumerate(clip.frames):
        predicted[understood, time] = session.step(frame).masks.cpu().numpy()
    return predicted


def _is_understood(model: RefSAM, text: str) -> bool:
    try:
        model.text_encoder([text])
    except ExpressionError:
        return False
    return True
