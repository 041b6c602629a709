"""J and F of the model during training, on clips that it is not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from refsam.data import DataError, ReferringDataset, VideoRecord
from refsam.data.dataset import UnreadableError
from refsam.data.generated import generate_clip
from refsam.metrics import contour_accuracy, region_similarity
from refsam.model import RefSAM
from refsam.model.text_encoder import refused_expressions
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


# Each clip is read or drawn when its function is called.
ValidationClips = Sequence[Callable[[], ValidationClip]]


def open_clips(settings: ValidationSettings, image_size: int) -> ValidationClips | None:
    """The validation clips of a run, None without validation; `image_size` is the model's, in pixels. Raises DataError.

    They are generated clips of colours, shapes and expressions that training never draws, or the first annotated frames of
    videos spread evenly over a dataset, with all of their expressions.
    """
    if settings.every is None:
        return None
    if settings.dataset is None:
        size = (9 * image_size // 16, image_size)
        return [partial(_generated, settings, size, index) for index in range(settings.clips)]
    dataset = settings.dataset.open()
    name = f"{dataset.name} {dataset.split}"
    if dataset.mask_source is None:
        raise DataError(
            f"validation.dataset: the masks of {name} are not there, want a split that has them"
        )
    videos = [video for video in dataset.videos if video.annotated]
    if not videos:
        raise DataError(f"validation.dataset: no frame of {name} has a mask")
    return [partial(_of_video, settings, dataset, video) for video in _chosen(settings, videos)]


def _generated(settings: ValidationSettings, size: tuple[int, int], index: int) -> ValidationClip:
    frames, kinds = settings.frames or 1, _KINDS[index % len(_KINDS)]
    clip = generate_clip(_SEED + index, frames=frames, size=size, kinds=kinds, held_out=True)
    return ValidationClip(clip.frames.numpy(), tuple(clip.expressions), clip.masks.numpy())


def _chosen(settings: ValidationSettings, videos: Sequence[VideoRecord]) -> Sequence[VideoRecord]:
    """Up to `clips` videos with at most `most_frames` frames in all, at least one."""
    videos = _spread(videos, min(settings.clips, len(videos)))
    for count in range(len(videos), 1, -1):
        chosen = _spread(videos, count)
        frames = sum(len(video.annotated[: settings.frames]) for video in chosen)
        if settings.most_frames is None or frames <= settings.most_frames:
            return chosen
    return videos[:1]


def _spread(videos: Sequence[VideoRecord], count: int) -> list[VideoRecord]:
    return [videos[index * len(videos) // count] for index in range(count)]


def _of_video(
    settings: ValidationSettings, dataset: ReferringDataset, video: VideoRecord
) -> ValidationClip:
    names, expressions = video.annotated[: settings.frames], dataset.expressions(video.name)
    masks = [[dataset.mask(each, name) for name in names] for each in expressions]
    return ValidationClip(
        np.stack([dataset.frame(video.name, name) for name in names]),
        tuple(each.text for each in expressions),
        np.array(masks, dtype=bool),
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
            clip = clips[index]()
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
    """The masks (E, T, H, W) that the model predicts frame by frame."""
    refused = refused_expressions(model.text_encoder, clip.texts)
    understood = [place for place, text in enumerate(clip.texts) if text not in refused]
    predicted = np.zeros_like(clip.masks)
    session = VideoSession(model, [clip.texts[place] for place in understood], optimize=False)
    for time, frame in enumerate(clip.frames):
        predicted[understood, time] = session.step(frame).masks.cpu().numpy()
    return predicted
