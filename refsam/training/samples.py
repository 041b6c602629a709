"""An HTML page of the clips, masks and expressions that a run trains on, after augmentation."""

import base64
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refsam.checkpoint import read_checkpoint, resolve_directory
from refsam.data.colour import adjust_colour
from refsam.images import encode_jpeg
from refsam.runtime.files import replace_file
from refsam.training.batches import (
    TrainingBatch,
    batches,
    open_photographs,
    open_stream,
)
from refsam.training.settings import TrainingSettings
from refsam.video.overlay import draw_overlay

_HEAD = (
    "<!doctype html><meta charset=utf-8><title>training clips</title>"
    "<style>body{font:15px sans-serif;margin:2em}img{max-width:100%}li{margin:.2em}</style>"
)


def write_page(settings: TrainingSettings, path: Path, steps: int) -> int:
    """Draw the clips of a run's first steps into one HTML file, which needs no network; returns their number.

    Each clip is its frames side by side with the masks of all of its expressions. Raises DataError as training does.
    """
    datasets = [entry.open() for entry in settings.data.datasets]
    size = _image_size(settings)
    drawer = open_photographs(settings.data.photographs)
    stream = open_stream(settings, datasets, size, 1, drawer)
    parts, count = [_HEAD], 0
    for step, batch in enumerate(batches(stream, 0, steps, workers=0)):
        for index in range(len(batch.clips.names)):
            parts.append(_section(batch, index, step))
            count += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "\n".join(parts))
    return count


def _image_size(settings: TrainingSettings) -> int:
    """The size that the model sees frames at, in pixels."""
    if settings.init_from is None:
        return settings.architecture.image_encoder.image_size
    stored = read_checkpoint(resolve_directory(settings.init_from))
    return settings.changed_architecture(stored.config).image_encoder.image_size


def _section(batch: TrainingBatch, index: int, step: int) -> str:
    clips = batch.clips
    height, width = clips.sizes[index]
    frames = clips.frames[index : index + 1, :, :height, :width]
    if clips.colour is not None:
        frames = adjust_colour(frames, clips.colour[index : index + 1], ((height, width),))
    pixels = frames[0].numpy()
    masks = clips.masks[index, :, :, :height, :width].numpy() == 1
    texts = clips.texts[index]
    shown = [draw_overlay(pixels[t], masks[:, t], texts) for t in range(len(pixels))]
    lines = "".join(
        f"<li>{escape(text)}: {100 * mask.mean():.2f} % of the pixels</li>"
        for text, mask in zip(texts, masks, strict=True)
    )
    name = escape(clips.names[index])
    return f"<h3>step {step}: {name}</h3><img src='{_picture(shown)}'><ul>{lines}</ul>"


def _picture(frames: list[NDArray[np.uint8]]) -> str:
    jpeg = encode_jpeg(np.concatenate(frames, axis=1))
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
