"""Training batches of photographs: clips, expressions, masks, and the pixels that the loss ignores."""

import numpy as np
import torch

from refsam.data.clips import ClipBatch
from refsam.data.photographs.expressions import PhotoGrammar
from refsam.data.photographs.scenes import SceneDrawer


def photograph_batch(
    drawer: SceneDrawer,
    seed: int,
    index: int,
    *,
    clips: int,
    frames: int,
    expressions: int,
    size: tuple[int, int],
) -> ClipBatch:
    """Batch number `index` of the stream that `seed` names, from these arguments alone; `size` is (height, width)."""
    pixels = torch.zeros(clips, frames, *size, 3, dtype=torch.uint8)
    masks = torch.zeros(clips, expressions, frames, *size, dtype=torch.bool)
    ignore = torch.zeros_like(masks)
    colour = torch.ones(clips, 4)
    texts = []
    for clip in range(clips):
        random = np.random.default_rng([seed, index, clip])
        drawn = drawer.clip(random, draw_times(random, frames), size)
        pixels[clip] = torch.from_numpy(drawn.frames)
        found = PhotoGrammar(random, drawer.folder, drawn).draw(expressions)
        for place, expression in enumerate(found):
            masks[clip, place] = torch.from_numpy(expression.mask)
            ignore[clip, place] = torch.from_numpy(expression.ignore)
        texts.append(tuple(expression.text for expression in found))
        # Brightness, contrast and saturation; with another hue the names of colours would be wrong.
        colour[clip, :3] = torch.from_numpy(random.uniform(0.8, 1.25, 3))
        colour[clip, 3] = 0
    names = tuple(f"photograph clip {clip} of batch {index}" for clip in range(clips))
    return ClipBatch(pixels, masks, (size,) * clips, tuple(texts), colour, names, ignore=ignore)


def draw_times(random: np.random.Generator, frames: int) -> np.ndarray:
    """Moments, in frames, at which a clip is seen: consecutive if it is long, else spread over a longer one."""
    if frames > 8:
        return np.arange(frames, dtype=float)
    return float(random.integers(1, 8)) * np.arange(frames)
