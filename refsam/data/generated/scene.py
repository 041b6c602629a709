"""Random scenes: the objects, their looks and their motion, but no pixels yet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from refsam.data.generated import palette
from refsam.data.generated.blocks import Block, sample_block, sample_side
from refsam.data.generated.shapes import NAMED_SHAPES, ROUNDED_SQUARE, UNNAMED_SHAPES, Shape, blob

MAX_OBJECTS = 20
_ALL = list(range(len(palette.COLOURS)))
_MUTED = {"brown", "black", "white", "grey"}
_VIVID = [index for index in _ALL if palette.COLOURS[index].name not in _MUTED]
_CLUTTER = palette.Colour("clutter", (10, 45), (0.1, 0.4), (0.3, 0.9))
_SMALLEST = 100  # pixels; the shape of a smaller object could not be seen
_SQUARE = [shape.name for shape in NAMED_SHAPES].index("square")
Kind = tuple[int | None, int | None]  # shape and colour of an object; None has no name


@dataclass(frozen=True)
class SceneStyle:
    """The distribution from which scenes are drawn.

    `areas` are the smallest and largest share of the frame that an object covers, `counts` how likely 1, 2, ... objects are,
    `clutter` how likely 0, 1, ... things without colour and name, `unnamed` how likely an object has a shape without a name,
    `blocks` how likely an object is a toy block, `alike` how likely all objects have one shape and few colours (never
    in held-out scenes).
    """

    areas: tuple[float, float] = (0.004, 0.13)
    counts: tuple[float, ...] = (0.08, 0.14, 0.2, 0.2, 0.16, 0.12, 0.1)
    clutter: tuple[float, ...] = (0.6, 0.25, 0.15)
    unnamed: float = 0.4
    blocks: float = 0.0
    alike: float = 0.0


STYLES = {
    "full": SceneStyle(),
    "larger": SceneStyle(areas=(0.01, 0.2)),
    "many": SceneStyle((0.008, 0.08), (0.0, 0.0, 0.2, 0.25, 0.25, 0.15, 0.15), (0.8, 0.2), 0.3),
    "crowd": SceneStyle((0.004, 0.02), (0.0,) * 7 + (0.1,) * 10, (0.8, 0.2), 0.2),
    "blocks": SceneStyle(
        (0.004, 0.04), (0.0,) * 2 + (0.0625,) * 16, (0.7, 0.3), 0.25, blocks=0.8, alike=0.6
    ),
    "few and large": SceneStyle((0.08, 0.35), (0.5, 0.35, 0.15), (1.0,), 0.15),
}


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene over T frames.

    `shape_index` and `colour_index` are None where no expression may name the shape or the colour (clutter has no colour).
    `area` is its share of the frame. `centre (T, 2)` is (x, y) as shares of width and height, `rotation (T,)` radians,
    `stretch` the ratio of its axes. `rgb` and `decal_rgb (3,)` are in 0..1.
    """

    shape: Shape
    shape_index: int | None
    colour_index: int | None
    rgb: np.ndarray
    area: float
    centre: np.ndarray
    rotation: np.ndarray
    stretch: float
    decal: tuple[float, float, float]  # x, y, radius in units of the outline; radius 0: none
    decal_rgb: np.ndarray
    shading: tuple[float, float, float]  # direction of a gradient (x, y), strength of a highlight
    texture: tuple[float, float, float]  # stripes: frequency, angle, contrast
    mottle: float  # how much of a photograph shows through
    shadow: float
    block: Block | None = None

    @cached_property
    def in_view(self) -> np.ndarray:
        """(T,) bool: its centre lies inside the frame."""
        return np.all((self.centre > 0.01) & (self.centre < 0.99), axis=1)


@dataclass(frozen=True)
class Background:
    """A crop of photograph number `photograph`, or (None) a pattern that varies between two colours, (3,) each in 0..1.

    `crop` is (x, y, scale) in shares of the photograph; `saturation` multiplies its colours; `grid` is (period in shares of
    the frame, strength) of lines drawn over it; `seed` fixes the pattern.
    """

    photograph: int | None
    crop: tuple[float, float, float]
    flip: bool
    saturation: float
    rgb: tuple[np.ndarray, np.ndarray]
    grid: tuple[float, float]
    seed: int


@dataclass(frozen=True)
class Scene:
    """Objects from back to front, the frame's size in pixels, and the camera's (x, y, zoom) per frame, (T, 3)."""

    objects: tuple[SceneObject, ...]
    size: tuple[int, int]
    camera: np.ndarray
    background: Background


def is_held_out(shape_index: int, colour_index: int) -> bool:
    """Whether this pair of shape and colour is kept for the benchmark and never trained on."""
    return (5 * shape_index + 3 * colour_index) % 11 == 0


def sample_scene(
    random: np.random.Generator,
    times: np.ndarray,
    size: tuple[int, int],
    photographs: int,
    held_out: bool,
    style: SceneStyle = STYLES["full"],
) -> Scene:
    """Draw a scene whose objects move over `times (T,)`, in frames; `held_out` makes one object a pair never trained on."""
    background = _sample_background(random, photographs)
    clutter = int(random.choice(len(style.clutter), p=style.clutter))
    # Photographs, clutter and wood show every muted colour, so expressions with one would be unclear.
    plain = not clutter and background.photograph is None and not style.blocks
    colours = _ALL if plain else _VIVID
    if style.alike and not held_out and random.random() < style.alike:
        kinds = _sample_alike_kinds(random, colours, style)
    else:
        kinds = _sample_kinds(random, colours, held_out, style)
    kinds += [(None, None)] * clutter
    scale = np.array([size[1], size[0]]) / np.sqrt(size[1] * size[0])
    placed: list[tuple[float, np.ndarray]] = []
    objects = []
    for index, (shape_index, colour_index) in enumerate(kinds):
        low, high = (0.005, 0.1) if held_out and index == 0 else style.areas
        area = _log_uniform(random, max(low, _SMALLEST / (size[0] * size[1])), high)
        if colour_index is None:
            area = _log_uniform(random, 0.01, 0.2)
        start = free_place(random, 0.04, np.sqrt(area), placed, scale=scale)
        placed.append((np.sqrt(area), start))
        path = start + _motion(random, times, start, leaves=index == 0 and random.random() < 0.2)
        rgb = _sample_rgb(random, colour_index, background)
        objects.append(_sample_object(random, shape_index, colour_index, rgb, area, path, times))
    if style.blocks:
        objects = _turn_into_blocks(random, objects, style.blocks)
    order = random.permutation(len(objects))
    objects = [objects[i] for i in order]
    return Scene(tuple(objects), size, _camera(random, times), background)


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))


def _sample_kinds(
    random: np.random.Generator, colours: list[int], held_out: bool, style: SceneStyle
) -> list[Kind]:
    """(shape, colour) of each object: the first is the most likely target, others often have its shape or colour."""
    count = 1 + int(random.choice(len(style.counts), p=style.counts))
    unnamed = 0.25 if held_out else style.unnamed
    first = _pair(random, colours, held_out, unnamed)
    kinds: list[Kind] = [first]
    for _ in range(count - 1):
        shape_index, colour_index = _pair(random, colours, False, style.unnamed)
        sharing = random.random()
        if sharing < 0.3:
            colour_index = first[1]
        elif sharing < 0.55:
            shape_index = first[0]
        elif sharing < 0.65:
            shape_index, colour_index = first
        if held_out or shape_index is None or not is_held_out(shape_index, colour_index):
            kinds.append((shape_index, colour_index))
    return kinds


def _sample_alike_kinds(
    random: np.random.Generator, colours: list[int], style: SceneStyle
) -> list[Kind]:
    """(shape, colour) of each object: one shape, most often the square, or none with a name, in two to five colours."""
    count = 1 + int(random.choice(len(style.counts), p=style.counts))
    shape = _SQUARE if random.random() < 0.6 else int(random.integers(len(NAMED_SHAPES)))
    has_name = random.random() >= style.unnamed
    trained = [c for c in colours if not (has_name and is_held_out(shape, c))]
    chosen = random.permutation(trained)[: random.integers(2, 6)]
    return [(shape if has_name else None, int(random.choice(chosen))) for _ in range(count)]


def _pair(
    random: np.random.Generator, colours: list[int], held_out: bool, unnamed: float
) -> tuple[int | None, int]:
    without_name = random.random() < unnamed
    while True:
        shape_index = int(random.integers(len(NAMED_SHAPES)))
        colour_index = colours[int(random.integers(len(colours)))]
        if without_name:
            return None, colour_index
        if is_held_out(shape_index, colour_index) == held_out:
            return shape_index, colour_index


def free_place(
    random: np.random.Generator,
    low: float,
    side: float,
    placed: Sequence[tuple[float, np.ndarray]],
    *,
    tries: int = 20,
    scale: np.ndarray | float = 1.0,
) -> np.ndarray:
    """A middle (x, y) in `low` to 1 - `low` that overlaps little with the (side, middle) placed already, if some tries find one.

    All are shares of the frame; `scale` of (x, y) makes its sides comparable.
    """
    for _ in range(tries):
        centre = random.uniform(low, 1 - low, 2)
        gaps = [
            np.linalg.norm((centre - other) * scale) - 0.55 * (side + own) for own, other in placed
        ]
        if not gaps or min(gaps) > 0:
            return centre
    return random.uniform(low, 1 - low, 2)


def _motion(
    random: np.random.Generator, times: np.ndarray, start: np.ndarray, leaves: bool
) -> np.ndarray:
    """Displacement (T, 2) from the start: a drift, a swing and, where it leaves, an excursion past the nearest edge."""
    drift = random.normal(0, 0.004, 2) * (random.random() < 0.8)
    swing = random.normal(0, 0.02, 2)
    phase, rate = random.uniform(0, 2 * np.pi), random.uniform(0.1, 0.5)
    path = times[:, None] * drift + swing * (np.sin(rate * times + phase) - np.sin(phase))[:, None]
    path = np.clip(start + path, 0.04, 0.96) - start
    if leaves:
        side = int(np.argmin(np.concatenate([start, 1 - start])))
        direction = np.eye(2)[side % 2] * (-1 if side < 2 else 1)
        begin, length = random.uniform(4, 12), random.uniform(5, 14)
        outside = np.clip(np.minimum(times - begin, begin + length - times) / 4 + 0.5, 0, 1)
        path = path + outside[:, None] * direction * (0.5 + np.abs(start - 0.5).max())
    return path


def _sample_object(
    random: np.random.Generator,
    shape_index: int | None,
    colour_index: int | None,
    rgb: np.ndarray,
    area: float,
    centre: np.ndarray,
    times: np.ndarray,
) -> SceneObject:
    if shape_index is not None:
        shape = NAMED_SHAPES[shape_index]
    elif random.random() < 0.5:
        shape = UNNAMED_SHAPES[int(random.integers(len(UNNAMED_SHAPES)))]
    else:
        shape = blob(random)
    spin = random.normal(0, 0.02) * (shape.tilt > 3)
    tilt = random.uniform(-shape.tilt, shape.tilt) * (1 if shape.tilt > 3 else random.random())
    stretch = float(np.exp(random.uniform(-1, 1) * np.log(shape.stretch)))
    has_decal = random.random() < 0.3 and shape.hole[2] == 0
    decal_radius = random.uniform(0.1, 0.26) if has_decal else 0.0
    decal_rgb = np.full(3, random.choice([0.05, 0.95])) if random.random() < 0.6 else rgb * 0.55
    striped = random.random() < 0.25
    return SceneObject(
        shape=shape,
        shape_index=shape_index,
        colour_index=colour_index,
        rgb=rgb,
        area=area,
        centre=centre,
        rotation=tilt + spin * times,
        stretch=stretch,
        decal=(random.uniform(-0.12, 0.12), random.uniform(-0.12, 0.12), decal_radius),
        decal_rgb=decal_rgb,
        shading=(random.normal(0, 0.25), random.normal(0, 0.25), max(0.0, random.normal(0, 0.35))),
        texture=(random.uniform(8, 30), random.uniform(0, np.pi), 0.3 * random.random() * striped),
        mottle=(
            random.uniform(0.5, 1.0)
            if colour_index is None
            else random.uniform(0, 0.5) * (random.random() < 0.5)
        ),
        shadow=random.uniform(0.1, 0.5) * (random.random() < 0.5),
    )


def _turn_into_blocks(
    random: np.random.Generator, objects: list[SceneObject], share: float
) -> list[SceneObject]:
    """The objects, with that share of the coloured ones turned into toy blocks."""
    side = sample_side(random)
    turned = []
    for item in objects:
        if item.colour_index is not None and random.random() < share:
            item = replace(item, block=sample_block(random, item.rgb, side))
            if item.shape_index == _SQUARE:
                # The letter on it shows a square to be one even if it is rotated.
                rotation = item.rotation + (random.uniform(-0.8, 0.8) - item.rotation[0])
                shape = ROUNDED_SQUARE if random.random() < 0.5 else item.shape
                item = replace(item, shape=shape, rotation=rotation)
        turned.append(item)
    return turned


def _sample_rgb(
    random: np.random.Generator, colour_index: int | None, background: Background
) -> np.ndarray:
    """A colour, (3,) in 0..1, that stands out from a patterned background if one is found within some tries."""
    for _ in range(10):
        rgb = palette.sample(
            _CLUTTER if colour_index is None else palette.COLOURS[colour_index], random
        )
        if background.photograph is not None or all(
            np.abs(rgb - other).max() > 0.25 for other in background.rgb
        ):
            break
    return rgb


def _camera(random: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """(T, 3): shift x and y as shares of the frame, and zoom."""
    moving = random.random() < 0.6
    phase, rate = random.uniform(0, 2 * np.pi, 3), random.uniform(0.05, 0.3, 3)
    wave = np.sin(rate * times[:, None] + phase) * moving
    return wave * np.array([0.03, 0.03, 0.05]) + np.array([0.0, 0.0, 1.0])


def _sample_background(random: np.random.Generator, photographs: int) -> Background:
    hue, saturation = random.uniform(0, 360), random.beta(1, 3) * 0.6
    first = palette.to_rgb(hue, saturation, random.uniform(0.05, 1))
    second = palette.to_rgb(
        hue + random.normal(0, 40), saturation * random.uniform(0.3, 1), random.uniform(0.05, 1)
    )
    scale = random.uniform(0.35, 1.0)
    crop = (*random.uniform(0, 1 - scale, 2), scale)
    has_photograph = photographs and random.random() < 0.65
    return Background(
        photograph=int(random.integers(photographs)) if has_photograph else None,
        crop=crop,
        flip=bool(random.random() < 0.5),
        saturation=1.0 if random.random() < 0.25 else random.uniform(0, 0.6),
        rgb=(first, second),
        grid=(random.uniform(0.03, 0.2), random.uniform(-0.5, 0.5) * (random.random() < 0.2)),
        seed=int(random.integers(2**31)),
    )
