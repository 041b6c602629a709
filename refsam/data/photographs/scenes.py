"""Random clips of photographs: a single one, one set into another, or objects cut out of some and pasted into others."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from refsam.data.dataset import DataError
from refsam.data.generated.scene import free_place
from refsam.data.photographs.folder import PhotoFolder
from refsam.data.photographs.layers import Layer, PhotoClip, Size, cover, draw
from refsam.data.photographs.pictures import Picture, cut_out, read_picture, without_things

Times = NDArray[np.float64]
# A photograph fills the frame if at least this share of it is then seen; otherwise it is set into another one.
_LEAST_SEEN = 0.6
_CANDIDATES = 3  # number of photographs from which the one that fits the frame best is taken
_TRIES = 12  # to find an object that can be cut out
_COVERED_FRAMES = 10.0


class SceneDrawer:
    """Draws clips from a folder.

    `composites` is the share of clips that are composites. A class is drawn in proportion to its number of photographs to the
    power `balance` (0: all classes equally often, 1: all photographs equally often). Photographs of the sources
    `only_cut_out` are used for cut-outs only; `cached` is how many photographs are kept decoded; `least` how many
    photographs a class needs to be drawn.
    """

    def __init__(
        self,
        folder: PhotoFolder,
        composites: float = 0.4,
        balance: float = 0.6,
        only_cut_out: tuple[str, ...] = (),
        cached: int = 0,
        least: int = 1,
    ) -> None:
        self.folder = folder
        self.composites = composites
        self.is_scene = [p.source not in only_cut_out for p in folder.photographs]
        self.classes = tuple(n for n, found in folder.by_class.items() if len(found) >= least)
        weights = np.array([len(folder.by_class[n]) for n in self.classes], float) ** balance
        self.weights = weights / weights.sum()
        self.picture = lru_cache(maxsize=cached)(self._read)

    def _read(self, number: int) -> Picture:
        return read_picture(self.folder, self.folder.photographs[number])

    def clip(self, random: np.random.Generator, times: Times, size: Size) -> PhotoClip:
        """A clip seen at the moments `times (T,)`, in frames, of `size` (height, width)."""
        if random.random() < self.composites:
            return self.composite(random, times, size)
        number = self._scene(random, size)
        if number is None:
            return self.composite(random, times, size)
        return self._photograph(random, times, size, _mirrored(random, self.picture(number)))

    def draw_class(self, random: np.random.Generator) -> str:
        """The name of a class."""
        return self.classes[random.choice(len(self.classes), p=self.weights)]

    def _scene(self, random: np.random.Generator, size: Size) -> int | None:
        """A photograph of a class drawn first: of a few, the one that fits the frame best; None if the class has no scene."""
        numbers = [n for n in self.folder.by_class[self.draw_class(random)] if self.is_scene[n]]
        if not numbers:
            return None
        drawn = random.choice(numbers, min(_CANDIDATES, len(numbers)), replace=False)
        if random.random() < 0.3:
            return int(drawn[0])
        photographs = self.folder.photographs
        return int(max(drawn, key=lambda n: _seen_share(photographs[n].size, size)))

    def _photograph(
        self, random: np.random.Generator, times: Times, size: Size, picture: Picture
    ) -> PhotoClip:
        """A photograph that covers the frame, or one set into a background."""
        height, width = picture.owner.shape
        fits = _seen_share((height, width), size) >= _LEAST_SEEN
        if fits and random.random() < 0.75:
            layer = _drifting(random, times, picture, random.uniform(1, 1.4))
            return draw([cover(layer, size)], size)
        inside = min(1.0, size[1] / size[0] * height / width)
        layer = _drifting(random, times, picture, inside * random.uniform(0.5, 1.0))
        below, mistaken = self._background(random, times, size)
        return draw([below, layer], size, mistaken)

    def _background(
        self, random: np.random.Generator, times: Times, size: Size
    ) -> tuple[Layer, tuple[str, ...]]:
        """A photograph without classes, or a plain colour where the folder has none; and the classes it is mistaken for."""
        rows = self.folder.backgrounds
        if not rows or random.random() < 0.15:
            image = np.full((*size, 3), random.integers(0, 256, 3), np.uint8)
            mistaken: tuple[str, ...] = ()
        else:
            row = rows[random.integers(len(rows))]
            image, mistaken = self.folder.image(row.image), row.mistaken
        picture = _mirrored(random, without_things(image))
        layer = _drifting(random, times, picture, random.uniform(1, 1.5))
        return cover(layer, size), mistaken

    def composite(self, random: np.random.Generator, times: Times, size: Size) -> PhotoClip:
        """One to five cut-outs on a background or on a photograph of another class; most have two or more of one kind."""
        name = self.draw_class(random)
        names = [name]
        for _ in range(int(random.choice(5, p=(0.15, 0.3, 0.3, 0.15, 0.1)))):
            near = self.folder.words.neighbours(name)
            draws = (name, name, near[random.integers(len(near))] if near else name)
            names.append(
                draws[random.integers(3)] if random.random() < 0.75 else self.draw_class(random)
            )
        cut_outs = [c for each in names if (c := self._cut_out(random, each)) is not None]
        number = self._scene(random, size) if random.random() < 0.4 else None
        mistaken: tuple[str, ...] = ()
        if number is None:
            below, mistaken = self._background(random, times, size)
        else:
            picture = _mirrored(random, self.picture(number))
            below = cover(_drifting(random, times, picture, random.uniform(1, 1.4)), size)
        layers = [below, *self._spread(random, times, size, cut_outs)]
        if len(times) > 1 and len(layers) > 1 and random.random() < 0.35:
            layers.append(self._coverer(random, times, size, layers[1]))
        return draw(_numbered(layers), size, mistaken)

    def alike(
        self, random: np.random.Generator, times: Times, size: Size, count: int
    ) -> PhotoClip | None:
        """This many cut-outs of one class on a background, none of them covered; None where the class drawn has too few."""
        name = self.draw_class(random)
        cut_outs = [c for _ in range(count) if (c := self._cut_out(random, name)) is not None]
        if len(cut_outs) < count:
            return None
        below, mistaken = self._background(random, times, size)
        layers = [below, *self._spread(random, times, size, cut_outs)]
        return draw(_numbered(layers), size, mistaken)

    def covered(self, random: np.random.Generator, times: Times, size: Size) -> PhotoClip:
        """A cut-out, thing 1, that something without a name hides for ten frames; raises DataError where none is found."""
        below, mistaken = self._background(random, times, size)
        for _ in range(_TRIES):
            alone = self._cut_out(random, self.draw_class(random))
            if alone is not None:
                target = self._spread(random, times, size, [alone])[0]
                layers = [below, target, self._coverer(random, times, size, target)]
                return draw(_numbered(layers), size, mistaken)
        raise DataError(f"{self.folder.root}: found no object that can be cut out")

    def _cut_out(self, random: np.random.Generator, name: str) -> Picture | None:
        numbers = self.folder.by_class.get(name, ())
        for _ in range(_TRIES if numbers else 0):
            picture = self.picture(int(numbers[random.integers(len(numbers))]))
            found = [n for n, thing in enumerate(picture.things, 1) if thing.name == name]
            alone = cut_out(picture, int(random.choice(found))) if found else None
            if alone is not None:
                return _mirrored(random, alone)
        return None

    def _spread(
        self, random: np.random.Generator, times: Times, size: Size, cut_outs: list[Picture]
    ) -> list[Layer]:
        """The cut-outs at places where they overlap little, each with its own motion."""
        layers: list[Layer] = []
        placed: list[tuple[float, NDArray[np.float64]]] = []
        side = float(np.exp(random.uniform(np.log(0.14), np.log(0.5))))
        one_stands_out = len(cut_outs) > 1 and random.random() < 0.25
        for place, picture in enumerate(cut_outs):
            height, width = picture.owner.shape
            # The geometric mean of its sides, as a share of the frame's; in a clip they have similar sizes, or one stands out.
            own = side * float(np.exp(random.normal(0, 0.3)))
            if one_stands_out:
                own *= 1.6 if place == 0 else 0.6
            tall = own * (height / width * size[1] / size[0]) ** 0.5
            tall = min(tall, 1.1, 1.1 * size[1] / size[0] * height / width)
            centre = free_place(random, min(0.4, own * 0.4), own, placed, tries=15)
            placed.append((own, centre))
            layers.append(
                Layer(
                    picture,
                    _way(random, times, centre, tall),
                    True,
                    gain=random.uniform(0.7, 1.25) * random.uniform(0.94, 1.06, 3),
                    shadow=random.uniform(0.1, 0.5) * (random.random() < 0.5),
                    softness=random.uniform(0.4, 1.2),
                )
            )
        return layers

    def _coverer(
        self, random: np.random.Generator, times: Times, size: Size, target: Layer
    ) -> Layer:
        """A piece of a background that slides over the target, hides it for ten frames and slides on."""
        angle = np.radians(np.abs(target.path[:, 3]).max())
        height, width = target.picture.owner.shape
        tall = height * np.cos(angle) + width * np.sin(angle)
        wide = width * np.cos(angle) + height * np.sin(angle)
        piece = self._piece(random, tall / wide)
        begin, end = _hidden_stretch(random, times)
        path = target.path.copy()
        path[:, 2] *= 1.15 * tall / height
        path[:, 3] = 0
        share = path[:, 2].max() * wide / tall * size[0] / size[1]
        away = np.maximum(0, np.maximum(begin - times, times - end))
        side = 1 if target.path[0, 0] < 0.5 else -1
        hidden = (times >= begin) & (times < end)
        path[:, 0] += side * np.where(hidden, 0, share * np.minimum(4, 0.5 + 0.3 * away))
        return Layer(without_things(piece), path, False)

    def _piece(self, random: np.random.Generator, ratio: float) -> NDArray[np.uint8]:
        """A part of a background, or a plain colour, with this ratio of height to width."""
        rows = self.folder.backgrounds
        if not rows:
            return np.full((max(1, round(8 * ratio)), 8, 3), random.integers(0, 256, 3), np.uint8)
        image = self.folder.image(rows[random.integers(len(rows))].image)
        height, width = image.shape[:2]
        tall, wide = min(height, width * ratio), min(width, height / ratio)
        top, left = (int(random.uniform(0, side)) for side in (height - tall, width - wide))
        return image[top : top + max(1, round(tall)), left : left + max(1, round(wide))]


def _hidden_stretch(random: np.random.Generator, times: Times) -> tuple[float, float]:
    """Times at which an object is hidden: ten frames, between the first and, if there are three, the last moment of a clip."""
    latest = times[-1] - _COVERED_FRAMES - 0.1
    first = times[0] + 0.1
    begin = random.uniform(first, latest) if latest > first else random.uniform(first, times[1])
    end = begin + _COVERED_FRAMES
    return begin, min(end, times[-1] - 0.1) if len(times) > 2 else end


def _numbered(layers: list[Layer]) -> list[Layer]:
    """The layers with their things numbered through the clip."""
    result, first = [], 1
    for layer in layers:
        result.append(replace(layer, first=first))
        first += len(layer.picture.things)
    return result


def _seen_share(photograph: Size, frame: Size) -> float:
    """The share of a photograph that is seen when it fills the frame."""
    ratio = (photograph[0] / photograph[1]) / (frame[0] / frame[1])
    return min(ratio, 1 / ratio)


def _mirrored(random: np.random.Generator, picture: Picture) -> Picture:
    """The picture, or its mirror image."""
    if random.random() < 0.5:
        return picture
    image, owner = (np.ascontiguousarray(v[:, ::-1]) for v in (picture.image, picture.owner))
    garments = None if picture.garments is None else np.ascontiguousarray(picture.garments[:, ::-1])
    return replace(picture, image=image, owner=owner, garments=garments)


def _drifting(random: np.random.Generator, times: Times, picture: Picture, height: float) -> Layer:
    """A rectangle, its height given as a share of the frame's, seen by a moving camera."""
    width_room = 0.5 * (random.random() < 0.9)
    middle = 0.5 + random.uniform(-width_room, width_room, 2)
    phase, rate = random.uniform(0, 2 * np.pi, 3), random.uniform(0.05, 0.3, 3)
    wave = np.sin(rate * times[:, None] + phase) * (random.random() < 0.7)
    path = np.zeros((len(times), 4))
    path[:, :2] = middle + wave[:, :2] * 0.05
    path[:, 2] = height * (1 + 0.06 * wave[:, 2])
    return Layer(picture, path, False, gain=random.uniform(0.8, 1.15) * np.ones(3))


def _way(
    random: np.random.Generator, times: Times, centre: NDArray[np.float64], tall: float
) -> NDArray[np.float64]:
    """A drift, a swing, a slow change of size and a little turning, (T, 4)."""
    drift = random.normal(0, 0.006, 2) * (random.random() < 0.8)
    phase, rate = random.uniform(0, 2 * np.pi, 2), random.uniform(0.1, 0.5, 2)
    wave = np.sin(rate * times[:, None] + phase) - np.sin(phase)
    path = np.zeros((len(times), 4))
    path[:, :2] = centre + times[:, None] * drift + wave[:, :1] * random.normal(0, 0.03, 2)
    path[:, 2] = tall * np.exp(random.normal(0, 0.06) * wave[:, 1])
    tilt = random.uniform(-14, 14) * (random.random() < 0.5)
    path[:, 3] = tilt + wave[:, 1] * random.normal(0, 1.5)
    return path
