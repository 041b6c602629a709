"""Batches and single clips: frames, expressions and the masks that they mean."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from refsam.data.generated.backgrounds import photographs
from refsam.data.generated.grammar import GeneratedExpression, Grammar
from refsam.data.generated.palette import COLOURS
from refsam.data.generated.render import render
from refsam.data.generated.scene import STYLES, Scene, sample_scene
from refsam.data.generated.shapes import NAMED_SHAPES

COLOUR_CLASSES = ("background", "no name", *(colour.name for colour in COLOURS))
SHAPE_CLASSES = ("background", "no name", *(shape.name for shape in NAMED_SHAPES))

# Probability of each kind of expression in training.
_TRAINED_KINDS = {
    "colour": 0.06,
    "shape": 0.13,
    "colour and shape": 0.12,
    "size": 0.13,
    "position": 0.08,
    "order": 0.27,
    "relation": 0.12,
    "plural": 0.08,
    "absent": 0.16,
}


@dataclass(frozen=True)
class GeneratedBatch:
    """B clips of T frames with E expressions each.

    `frames (B, T, H, W, 3)` uint8 RGB; `masks (B, E, T, H, W)` bool, the visible part; `expressions` B lists of E;
    `attributes (B, T, H, W, 2)` uint8, what is seen at each pixel: colour and shape, numbered as in `COLOUR_CLASSES` and
    `SHAPE_CLASSES`; `owner (B, T, H, W)` int8, which object, -1 for none.
    """

    frames: Tensor
    masks: Tensor
    expressions: list[list[GeneratedExpression]]
    attributes: Tensor
    owner: Tensor


@dataclass(frozen=True)
class GeneratedClip:
    """One clip: `frames (T, H, W, 3)` uint8 RGB, `masks (E, T, H, W)` bool, E expressions and their kinds."""

    frames: Tensor
    masks: Tensor
    expressions: list[str]
    kinds: list[str]


def generate_batch(
    seed: int,
    index: int,
    *,
    clips: int,
    frames: int,
    expressions: int,
    size: tuple[int, int],
    style: str = "full",
    held_out: bool = False,
    device: str | torch.device = "cpu",
) -> GeneratedBatch:
    """Draw batch number `index` of the stream that `seed` names; the same arguments give the same batch on one device.

    `size` is (height, width) in pixels, `style` one of `scene.STYLES`. `held_out` takes backgrounds, templates and pairs of
    colour and shape that training never sees.
    """
    images = photographs(held_out)
    scenes, drawn = [], []
    for clip in range(clips):
        random = np.random.default_rng([seed, index, clip])
        times = _times(random, frames)
        scene = sample_scene(random, times, size, len(images), held_out, STYLES[style])
        scenes.append(scene)
        drawn.append(_sample_expressions(random, scene, expressions, held_out))
    generator = torch.Generator(device).manual_seed(
        int(np.random.default_rng([seed, index]).integers(2**62))
    )
    pixels, owner = render(scenes, images, generator)
    masks = torch.stack([_masks(owner[b], drawn[b]) for b in range(clips)])
    attributes = torch.stack([_attributes(owner[b], scenes[b]) for b in range(clips)])
    return GeneratedBatch(pixels, masks, drawn, attributes, owner)


def generate_clip(
    seed: int = 0,
    *,
    frames: int = 24,
    size: tuple[int, int] = (360, 640),
    kinds: tuple[str, ...] = ("colour", "colour and shape"),
    with_photographs: bool = False,
    held_out: bool = False,
) -> GeneratedClip:
    """Draw one clip with an expression of each kind, each about another object; without photographs no file is needed.

    `size` is (height, width) in pixels, `kinds` out of `grammar.KINDS`; `held_out` as for `generate_batch`. Raises
    ValueError where no scene allows all the kinds.
    """
    images = photographs(held_out) if with_photographs else ()
    scene, expressions = sample_clip(seed, frames, size, kinds, len(images), held_out)
    pixels, owner = render([scene], images, torch.Generator().manual_seed(seed))
    masks = _masks(owner[0], expressions)
    return GeneratedClip(
        pixels[0], masks, [e.text for e in expressions], [e.kind for e in expressions]
    )


def sample_clip(
    seed: int,
    frames: int,
    size: tuple[int, int],
    kinds: tuple[str, ...],
    photographs: int,
    held_out: bool,
) -> tuple[Scene, list[GeneratedExpression]]:
    """The scene and expressions of `generate_clip`; `photographs` is the number of backgrounds to choose from."""
    for attempt in range(1000):
        random = np.random.default_rng([seed, attempt])
        scene = sample_scene(random, np.arange(frames), size, photographs, held_out)
        grammar = Grammar(random, held_out)
        expressions = [grammar.expression(scene, kind) for kind in kinds]
        found = [expression for expression in expressions if expression is not None]
        if len(found) == len(kinds) and len({e.targets for e in found}) == len(kinds):
            return scene, found
    raise ValueError(f"kinds: no scene with seed {seed} allows expressions of all of {kinds}")


def _times(random: np.random.Generator, frames: int) -> np.ndarray:
    """Moments, in frames, at which a clip is seen: consecutive if it is long, else spread over a longer one."""
    if frames > 8:
        return np.arange(frames)
    stride = random.integers(1, 5)
    return random.integers(0, 24 - frames) + stride * np.arange(frames)


def _sample_expressions(
    random: np.random.Generator, scene: Scene, count: int, held_out: bool
) -> list[GeneratedExpression]:
    grammar = Grammar(random, held_out)
    names, weights = list(_TRAINED_KINDS), np.array(list(_TRAINED_KINDS.values()))
    expressions: list[GeneratedExpression] = []
    while len(expressions) < count:
        # Most scenes do not allow every kind: ask for several, so that absent objects stay as rare as they should be.
        kinds = random.choice(names, size=5, p=weights / weights.sum())
        found = (grammar.expression(scene, str(kind)) for kind in (*kinds, "absent"))
        expressions += islice((expression for expression in found if expression is not None), 1)
    return expressions


def _masks(owner: Tensor, expressions: list[GeneratedExpression]) -> Tensor:
    """(E, T, H, W) bool from owner (T, H, W)."""
    masks = torch.zeros(len(expressions), *owner.shape, dtype=torch.bool, device=owner.device)
    for mask, expression in zip(masks, expressions, strict=True):
        for target in expression.targets:
            mask |= owner == target
    return masks


def _attributes(owner: Tensor, scene: Scene) -> Tensor:
    """(T, H, W, 2) uint8 from owner (T, H, W): the numbers of colour and shape, 0 the background, 1 without a name."""
    rows = [[0, 0]]
    for item in scene.objects:
        pair = (item.colour_index, item.shape_index)
        rows.append([1 if index is None else index + 2 for index in pair])
    table = torch.tensor(rows, dtype=torch.uint8, device=owner.device)
    return table[owner.long() + 1]
