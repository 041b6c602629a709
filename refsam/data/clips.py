"""Training clips from datasets: frames, their crop and motion, and the masks of expressions in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from refsam.data.augmentation import (
    Augmentation,
    Geometry,
    Motion,
    draw_colour,
    draw_geometry,
    draw_motion,
)
from refsam.data.dataset import (
    DataError,
    Expression,
    ReferringDataset,
    UnreadableError,
    VideoRecord,
    image_size,
    read_image,
)
from refsam.data.mirroring import mirrored

# How often one sample is drawn, if nothing of its object is seen, before another one is taken; and the draws in all.
_DRAWS_OF_SAMPLE = 4
_DRAWS = 40
# Largest distance of the two other frames from the first (ReferFormer's sampler, which RefSAM uses).
_REACH = 3


@dataclass(frozen=True)
class Clip:
    """T frames and the masks of E expressions in them.

    `frames (T, H, W, 3)` uint8 RGB, `masks (E, T, H, W)` bool, `colour (4,)` float32 for `adjust_colour`; `name` says where it
    is from, `skipped` which samples could not be read before it.
    """

    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    texts: tuple[str, ...]
    colour: NDArray[np.float32]
    name: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClipBatch:
    """B clips: `frames (B, T, H, W, 3)` uint8 RGB and `masks (B, E, T, H, W)` bool, zeros right and below each clip's own size.

    `sizes` (height, width), E `texts` and the `name` of each clip; `colour (B, 4)` as `adjust_colour` takes it, None for no
    change; `skipped` what could not be read; `ignore (B, E, T, H, W)` bool, pixels whose truth is unknown (None: none).
    """

    frames: Tensor
    masks: Tensor
    sizes: tuple[tuple[int, int], ...]
    texts: tuple[tuple[str, ...], ...]
    colour: Tensor | None
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    ignore: Tensor | None = None

    @staticmethod
    def of(clips: Sequence[Clip]) -> "ClipBatch":
        """Clips of the same numbers of frames and expressions, side by side."""
        sizes = tuple((clip.frames.shape[1], clip.frames.shape[2]) for clip in clips)
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        lengths, expressions = clips[0].frames.shape[0], clips[0].masks.shape[0]
        frames = torch.zeros(len(clips), lengths, height, width, 3, dtype=torch.uint8)
        masks = torch.zeros(len(clips), expressions, lengths, height, width, dtype=torch.bool)
        for index, (clip, (h, w)) in enumerate(zip(clips, sizes, strict=True)):
            frames[index, :, :h, :w] = torch.from_numpy(clip.frames)
            masks[index, :, :, :h, :w] = torch.from_numpy(clip.masks)
        return ClipBatch(
            frames,
            masks,
            sizes,
            tuple(clip.texts for clip in clips),
            torch.from_numpy(np.stack([clip.colour for clip in clips])),
            tuple(clip.name for clip in clips),
            tuple(message for clip in clips for message in clip.skipped),
        )


def sample_frames(random: np.random.Generator, anchor: int, wanted: int, length: int) -> list[int]:
    """Positions of `wanted` frames of a video of `length` frames, in order, one of them the anchor.

    One frame up to three before the anchor and one up to three after it, clamped to the video (with two wanted, one of these);
    more are drawn from outside that stretch, from the whole video where there are too few. Positions repeat where they must.
    """
    around = [anchor - random.integers(1, _REACH + 1), anchor + random.integers(1, _REACH + 1)]
    if wanted == 2:
        around = [around[random.integers(2)]]
    chosen = [anchor, *(int(np.clip(position, 0, length - 1)) for position in around)][:wanted]
    missing = wanted - len(chosen)
    outside = [*range(min(chosen)), *range(max(chosen) + 1, length)]
    pool = outside if len(outside) >= missing else list(range(length))
    drawn = random.choice(pool, missing, replace=len(pool) < missing)
    return sorted([*chosen, *(int(position) for position in drawn)])


class ClipSampler:
    """The training samples of one dataset: each expression once for every stretch of `frames` annotated frames of its video.

    The anchor is drawn from the stretch. With several `expressions`, the others are of the same video, again from the start
    where it has too few. `unreadable`: "skip" takes another sample in place of one that needs an unreadable file,
    "stop" raises.
    """

    def __init__(
        self,
        dataset: ReferringDataset,
        frames: int,
        expressions: int = 1,
        augmentation: Augmentation | None = None,
        unreadable: str = "stop",
    ) -> None:
        self.dataset = dataset
        self.frames = frames
        self.expressions = expressions
        self.augmentation = augmentation or Augmentation()
        self.unreadable = unreadable
        self.samples = [
            (video, expression, begin)
            for video in dataset.videos
            for expression in dataset.expressions(video.name)
            for begin in range(0, len(video.annotated), frames)
        ]
        self.name = f"{dataset.name} {dataset.split}"
        if not self.samples:
            raise DataError(f"{self.name}: nothing to train on, as no frame has a mask")

    def __len__(self) -> int:
        return len(self.samples)

    def clip(self, seed: int, epoch: int, index: int) -> Clip:
        """Sample `index` of an epoch, drawn from (seed, epoch, index) alone.

        A clip without a pixel of the first expression's mask is drawn again, after some tries from another sample, unless
        the expression means nothing. Raises UnreadableError where `unreadable` is "stop", DataError where no draw shows anything.
        """
        skipped: list[str] = []
        for attempt in range(_DRAWS):
            random = np.random.default_rng([seed, epoch, index, attempt])
            elsewhere = skipped or attempt >= _DRAWS_OF_SAMPLE
            number = random.integers(len(self)) if elsewhere else index
            video, expression, begin = self.samples[number]
            try:
                clip = self._draw(random, video, expression, begin)
            except UnreadableError as error:
                if self.unreadable == "stop":
                    raise
                skipped.append(str(error))
                continue
            if clip.masks[0].any() or expression.object_ids == ():
                return replace(clip, skipped=tuple(skipped))
        raise DataError(
            f"{self.name}: {_DRAWS} draws for sample {index} showed no object or could not be read; "
            f"look at it with: refsam data check {self.dataset.root} --decode"
        )

    def _draw(
        self, random: np.random.Generator, video: VideoRecord, expression: Expression, begin: int
    ) -> Clip:
        names = video.annotated
        anchor = int(random.integers(begin, min(begin + self.frames, len(names))))
        positions = sample_frames(random, anchor, self.frames, len(names))
        expressions = self._with_others(random, expression)
        other_texts = [mirrored(each.text) for each in expressions]
        size = image_size(self.dataset.frame_file(video.name, names[anchor]))
        geometry = draw_geometry(random, self.augmentation, size, None not in other_texts)
        motion = draw_motion(random, self.augmentation, self.frames) if len(names) == 1 else None
        reader = _ClipReader(self.dataset, video, geometry, motion)
        pixels = [reader.pixels(names[p], time) for time, p in enumerate(positions)]
        masks = [
            [reader.mask(each, names[p], time) for time, p in enumerate(positions)]
            for each in expressions
        ]
        texts = other_texts if geometry.flipped else [each.text for each in expressions]
        numbers = ",".join(each.expression_id for each in expressions)
        frames = ",".join(names[p] for p in positions)
        return Clip(
            np.stack(pixels),
            np.array(masks),
            tuple(text for text in texts if text is not None),
            draw_colour(random, self.augmentation),
            f"{self.name} {video.name}, expressions {numbers}, frames {frames}",
        )

    def _with_others(self, random: np.random.Generator, expression: Expression) -> list[Expression]:
        others = [e for e in self.dataset.expressions(expression.video) if e != expression]
        rows = [expression, *(others[i] for i in random.permutation(len(others)))]
        return [rows[index % len(rows)] for index in range(self.expressions)]


class _ClipReader:
    """Frames and masks of one clip; a still image is decoded once."""

    def __init__(
        self,
        dataset: ReferringDataset,
        video: VideoRecord,
        geometry: Geometry,
        motion: Motion | None,
    ) -> None:
        self.dataset, self.video, self.geometry, self.motion = dataset, video, geometry, motion
        self.image = lru_cache(self._image)
        self.true_mask = lru_cache(self._true_mask)

    def pixels(self, frame: str, time: int) -> NDArray[np.uint8]:
        """(h, w, 3) uint8."""
        image, _ = self.image(frame)
        return self.geometry.of_image(self._moved(image, time))

    def mask(self, expression: Expression, frame: str, time: int) -> NDArray[np.bool_]:
        """(h, w) bool."""
        return self.geometry.of_mask(self._moved(self.true_mask(expression, frame), time))

    def _moved(self, image: Image.Image, time: int) -> Image.Image:
        return image if self.motion is None else self.motion.moved(image, time)

    def _image(self, frame: str) -> tuple[Image.Image, tuple[int, int]]:
        path = self.dataset.frame_file(self.video.name, frame)
        return read_image(path, self.geometry.decoded_size)

    def _true_mask(self, expression: Expression, frame: str) -> Image.Image:
        _, size = self.image(frame)
        mask = self.dataset.mask(expression, frame, size)
        if mask is None:
            raise DataError(
                f"{self.dataset.name}: no object is known for expression {expression.expression_id} of {expression.video}"
            )
        return Image.fromarray(mask.view(np.uint8))


class ClipMixture:
    """Several samplers as one endless stream.

    A sampler's weight says how often an epoch goes through its samples: with 1 every sample occurs once, with 0.5 half of them
    do, another half in each epoch. The order is drawn from (seed, epoch).
    """

    def __init__(
        self, samplers: Sequence[ClipSampler], weights: Sequence[float], seed: int
    ) -> None:
        self.samplers = list(samplers)
        self.seed = seed
        self.shares = [
            max(1, round(weight * len(sampler)))
            for sampler, weight in zip(samplers, weights, strict=True)
        ]
        self._order = lru_cache(maxsize=1)(self._draw_order)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.shares)

    def clip(self, position: int) -> Clip:
        """Clip number `position` of the stream."""
        epoch, place = divmod(position, len(self))
        which, index = self._order(epoch)[place]
        return self.samplers[which].clip(self.seed, epoch, int(index))

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """(len, 2): sampler and sample."""
        random = np.random.default_rng([self.seed, epoch])
        rows = []
        for which, (sampler, share) in enumerate(zip(self.samplers, self.shares, strict=True)):
            rounds = -(-share // len(sampler))
            order = np.concatenate([random.permutation(len(sampler)) for _ in range(rounds)])
            rows.append(np.stack([np.full(share, which), order[:share]], axis=1))
        return random.permutation(np.concatenate(rows))
