"""Expressions about a scene: nouns, synonyms, templates, and the objects that each expression means."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refsam.data.generated.palette import COLOURS
from refsam.data.generated.scene import Scene, SceneObject, is_held_out
from refsam.data.generated.shapes import NAMED_SHAPES

KINDS = ("colour", "shape", "colour and shape", "size", "position", "order", "relation", "absent")

COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise", "teal"),
    "blue": ("blue", "navy"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "brown": ("brown",),
    "black": ("black", "dark"),
    "white": ("white",),
    "grey": ("grey", "gray"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "disk", "sphere"),
    "square": ("square",),
    "rectangle": ("rectangle",),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "oval": ("oval", "ellipse"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop", "donut"),
    "hexagon": ("hexagon",),
    "crescent": ("crescent", "moon"),
    "arrow": ("arrow",),
}
GENERIC_NOUNS = ("object", "thing", "shape", "item", "figure", "one")
# Nouns of everyday things: the generated objects do not look like them, so only their colour is taught.
EVERYDAY_NOUNS = tuple(
    "backpack bag bottle cup mug glass bowl plate box block cube brick bucket can jar basket suitcase parcel ball balloon "
    "toy doll car truck bus van bike bicycle motorcycle boat train plane scooter helmet hat cap shirt jacket coat dress "
    "skirt scarf sweater shoe sock glove tie towel blanket pillow cushion umbrella kite flag book notebook pen phone "
    "laptop screen chair table sofa lamp door sign cone barrel flower apple lemon banana pear pepper tomato cake "
    "candle bird fish dog cat horse person man woman boy girl player block tent rope tool hammer kettle pot pan spoon "
    "surfboard skateboard frisbee racket bench mat curtain clock vase rug can cart bear duck shorts trousers".split()
)
SIZE_WORDS = {
    "small": ("small", "smaller", "smallest", "little", "tiny"),
    "large": ("big", "bigger", "biggest", "large", "larger", "largest"),
}
SIDE_WORDS = {  # as an adjective; "on the left" takes the key itself
    "left": ("left", "leftmost", "left-hand"),
    "right": ("right", "rightmost", "right-hand"),
    "top": ("top", "upper", "topmost", "highest"),
    "bottom": ("bottom", "lower", "lowest"),
}
ORDINALS = ("first", "second", "third", "fourth")
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "top": ("above", "over"),
    "bottom": ("below", "under", "beneath"),
}
_PLURALS = {
    "box": "boxes", "cross": "crosses", "glass": "glasses", "bus": "buses", "dress": "dresses", "bench": "benches",
    "person": "people", "man": "men", "woman": "women", "fish": "fish", "shorts": "shorts", "trousers": "trousers",
}  # fmt: skip

# Templates: {np} is a noun phrase such as "red cup"; {c}, {n} its colour and noun. The second tuple of each pair
# is kept for the benchmark and never trained on.
TEMPLATES = {
    "plain": (
        ("the {np}", "the {np}", "the {np}", "{np}", "a {np}", "that {np}", "track the {np}", "find a {np}",
         "the {np} in the video", "segment the {np}", "which {np}"),
        ("track that {np}", "segment a {np} in the video", "find the {np}"),
    ),
    "coloured": (
        ("the {n} that is {c}", "the {c} coloured {n}", "a {n} which is {c}", "the {n} in {c}"),
        ("that {n} which is {c}", "segment the {c} coloured {n}", "the {n} coloured {c}"),
    ),
    "size": (
        ("the {size} {np}", "{size} {np}", "the {np} that is {size}", "find the {size} {np}"),
        ("track the {size} {np}", "that {size} {np}", "the {np} which is {size}"),
    ),
    "position": (
        ("the {np} on the {side}", "the {sidemost} {np}", "the {np} at the {side}", "the {np} furthest to the {side}",
         "{sidemost} {np}"),
        ("that {np} on the {side} in the video", "find the {sidemost} {np}", "the {np} that is furthest to the {side}"),
    ),
    "order": (
        ("the {ordinal} {np} from the {side}", "{ordinal} {np} from the {side}"),
        ("from the {side} the {ordinal} {np}", "that {ordinal} {np} from the {side}"),
    ),
    "relation": (
        ("the {np} {relation} the {anchor}", "{np} {relation} the {anchor}", "a {np} that is {relation} the {anchor}"),
        ("find the {np} {relation} the {anchor}", "the {np} which is {relation} the {anchor}"),
    ),
    "plural": (("the {nps}", "{nps}", "all {nps}", "every {np}", "all the {nps}"), ()),
}  # fmt: skip


@dataclass(frozen=True)
class GeneratedExpression:
    """An expression, its kind, and the indices of the scene's objects that it means (none: absent)."""

    text: str
    kind: str
    targets: tuple[int, ...]


def vocabulary() -> list[str]:
    """Every word that a generated expression can hold, sorted."""
    groups = (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, SIDE_WORDS, RELATION_WORDS)
    phrases = [phrase for group in groups for words in group.values() for phrase in words]
    words = set(" ".join(phrases).split())
    nouns = set(GENERIC_NOUNS) | set(EVERYDAY_NOUNS) | {w for v in SHAPE_WORDS.values() for w in v}
    words |= set(SIDE_WORDS) | nouns | {_plural(noun) for noun in nouns} | set(ORDINALS)
    for trained, kept in TEMPLATES.values():
        words.update(word for text in trained + kept for word in text.split() if "{" not in word)
    return sorted(words)


def everyday_words() -> list[str]:
    """The nouns of everyday things that stand for any generated object, and their plurals, sorted."""
    others = {*GENERIC_NOUNS, *(word for words in SHAPE_WORDS.values() for word in words)}
    nouns = [noun for noun in EVERYDAY_NOUNS if noun not in others]
    return sorted({*nouns, *(_plural(noun) for noun in nouns)})


class Grammar:
    """Draws expressions about a scene; `held_out`: with templates and pairs of colour and shape that training never uses."""

    def __init__(self, random: np.random.Generator, held_out: bool) -> None:
        self.random = random
        self.held_out = held_out

    def expression(self, scene: Scene, kind: str) -> GeneratedExpression | None:
        """An expression of this kind that is true of exactly its targets in every frame; None where the scene allows none."""
        if kind == "absent":
            return self._absent(scene)
        if kind == "plural":  # not a kind of the benchmark
            return None if self.held_out else self._plural(scene)
        candidates = [
            (text, target)
            for target, item in enumerate(scene.objects)
            if _can_be_target(item, self.held_out)
            and (text := self._describe(scene, target, kind)) is not None
        ]
        if not candidates:
            return None
        text, target = candidates[self.random.integers(len(candidates))]
        return GeneratedExpression(text, kind, (target,))

    def _describe(self, scene: Scene, target: int, kind: str) -> str | None:
        """An expression of this kind that singles the target out, or None."""
        if kind in ("colour", "shape", "colour and shape"):
            use = {"colour": (True, False), "shape": (False, True)}.get(kind, (True, True))
            return self._direct(scene, target, *use)
        item = scene.objects[target]
        for use_colour, use_shape in self.random.permutation([(0, 0), (1, 0), (0, 1), (1, 1)]):
            rivals = _matching(scene, item, bool(use_colour), bool(use_shape))
            if rivals is None or len(rivals) < 2:
                continue
            phrase = self._phrase(*_named(item, use_colour, use_shape))
            slots = getattr(self, f"_{kind}")(scene, target, rivals)
            if slots is not None:
                return self._template(kind).format(np=phrase, **slots)
        return None

    def _direct(self, scene: Scene, target: int, use_colour: bool, use_shape: bool) -> str | None:
        item = scene.objects[target]
        if _matching(scene, item, use_colour, use_shape) != [target]:
            return None
        colour, noun = self._words(*_named(item, use_colour, use_shape))
        if colour and self.random.random() < 0.25:
            return self._template("coloured").format(c=colour, n=noun)
        return self._template("plain").format(np=f"{colour} {noun}".strip())

    def _size(self, scene: Scene, target: int, rivals: list[int]) -> dict[str, str] | None:
        areas = {i: scene.objects[i].area for i in rivals}
        others = [areas[i] for i in rivals if i != target]
        if areas[target] > 1.7 * max(others):
            return {"size": self._pick(SIZE_WORDS["large"])}
        if areas[target] < min(others) / 1.7:
            return {"size": self._pick(SIZE_WORDS["small"])}
        return None

    def _position(self, scene: Scene, target: int, rivals: list[int]) -> dict[str, str] | None:
        for side in self.random.permutation(list(SIDE_WORDS)):
            rank = _rank(scene, target, rivals, side, margin=0.1)
            if rank == 0:
                return {"side": str(side), "sidemost": self._pick(SIDE_WORDS[side])}
        return None

    def _order(self, scene: Scene, target: int, rivals: list[int]) -> dict[str, str] | None:
        if len(rivals) < 3:
            return None
        for side in self.random.permutation(["left", "right", "top", "bottom"]):
            rank = _rank(scene, target, rivals, side, margin=0.06)
            if rank is not None and rank < len(ORDINALS) and (rank or self.random.random() < 0.3):
                return {"side": str(side), "ordinal": ORDINALS[rank]}
        return None

    def _relation(self, scene: Scene, target: int, rivals: list[int]) -> dict[str, str] | None:
        """The target is the only similar object on that side of an anchor, which is named by colour and shape."""
        for anchor in self.random.permutation(len(scene.objects)):
            item = scene.objects[anchor]
            if anchor in rivals or item.colour_index is None:
                continue
            if _matching(scene, item, True, item.shape_index is not None) != [anchor]:
                continue
            for side in self.random.permutation(list(RELATION_WORDS)):
                beside = [_is_beside(scene, i, int(anchor), side) for i in rivals]
                alone = [i for i, may in zip(rivals, beside, strict=True) if may is not False]
                if alone == [target] and beside[rivals.index(target)]:
                    name = self._phrase(item.colour_index, item.shape_index)
                    return {"relation": self._pick(RELATION_WORDS[side]), "anchor": name}
        return None

    def _plural(self, scene: Scene) -> GeneratedExpression | None:
        item = scene.objects[self.random.integers(len(scene.objects))]
        uses = ((True, False), (False, True), (True, True))[self.random.integers(3)]
        rivals = _matching(scene, item, *uses)
        if rivals is None or len(rivals) < 2:
            return None
        colour, noun = self._words(*_named(item, *uses))
        slots = {"np": f"{colour} {noun}".strip(), "nps": f"{colour} {_plural(noun)}".strip()}
        text = self._template("plural").format(**slots)
        return GeneratedExpression(text, "plural", tuple(rivals))

    def _absent(self, scene: Scene) -> GeneratedExpression | None:
        """An expression true of nothing here; most often another object has its colour or shape."""
        named = [item for item in scene.objects if item.colour_index is not None]
        for _ in range(10):
            colour_index = int(self.random.integers(len(COLOURS)))
            shape_index = int(self.random.integers(len(NAMED_SHAPES)))
            near = named[self.random.integers(len(named))]
            use_shape = self.random.random() < 0.5
            if use_shape and self.random.random() < 0.4 and near.colour_index is not None:
                colour_index = near.colour_index
            elif use_shape and self.random.random() < 0.6 and near.shape_index is not None:
                shape_index = near.shape_index
            if use_shape and is_held_out(shape_index, colour_index) != self.held_out:
                continue
            use_colour = not use_shape or self.random.random() < 0.8
            if any(
                (item.colour_index == colour_index or not use_colour)
                and (item.shape_index == shape_index or not use_shape)
                for item in named
            ):
                continue
            phrase = self._phrase(
                colour_index if use_colour else None, shape_index if use_shape else None
            )
            return GeneratedExpression(self._template("plain").format(np=phrase), "absent", ())
        return None

    def _phrase(self, colour: int | None, shape: int | None) -> str:
        return " ".join(self._words(colour, shape)).strip()

    def _words(self, colour: int | None, shape: int | None) -> tuple[str, str]:
        """Words for a colour and a shape; without a colour no word, without a shape a noun that fits any."""
        word = "" if colour is None else self._pick(COLOUR_WORDS[COLOURS[colour].name])
        if shape is None:
            return word, self._noun(everyday=colour is not None)
        return word, self._pick(SHAPE_WORDS[NAMED_SHAPES[shape].name or ""])

    def _noun(self, everyday: bool) -> str:
        if not everyday or self.random.random() < 0.35:
            return self._pick(GENERIC_NOUNS)
        if self.random.random() < 0.08 and not self.held_out:
            return "unheard-of"  # stands for the nouns that the vocabulary lacks
        return self._pick(EVERYDAY_NOUNS)

    def _template(self, name: str) -> str:
        return self._pick(TEMPLATES[name][1 if self.held_out else 0])

    def _pick(self, choices: Sequence[str]) -> str:
        """Mostly the first and most usual word, otherwise one of its synonyms."""
        if isinstance(choices, tuple) and len(choices) < 6 and self.random.random() < 0.4:
            return choices[0]
        return choices[int(self.random.integers(len(choices)))]


def _named(item: SceneObject, colour: bool, shape: bool) -> tuple[int | None, int | None]:
    """Indices of the item's colour and shape; None for one that is not named."""
    return item.colour_index if colour else None, item.shape_index if shape else None


def _can_be_target(item: SceneObject, held_out: bool) -> bool:
    """Whether it has a colour and, in the benchmark, a fitting size and a pair of colour and shape that is held out."""
    if item.colour_index is None or not held_out:
        return item.colour_index is not None
    shape = item.shape_index
    return 0.005 <= item.area <= 0.1 and (shape is None or is_held_out(shape, item.colour_index))


def _matching(
    scene: Scene, item: SceneObject, use_colour: bool, use_shape: bool
) -> list[int] | None:
    """Objects with the item's colour and shape, if these are named; None where the words would be unclear."""
    if (use_colour and item.colour_index is None) or (use_shape and item.shape_index is None):
        return None
    if not use_colour and not use_shape and any(o.colour_index is None for o in scene.objects):
        return None
    return [
        index
        for index, other in enumerate(scene.objects)
        if (not use_colour or other.colour_index == item.colour_index)
        and (not use_shape or other.shape_index == item.shape_index)
    ]


def _along(scene: Scene, index: int, side: str) -> np.ndarray:
    """(T,) the object's distance from that side, as a share of the frame."""
    centre = scene.objects[index].centre
    along = centre[:, 0 if side in ("left", "right") else 1]
    return along if side in ("left", "top") else 1 - along


def _rank(scene: Scene, target: int, rivals: list[int], side: str, margin: float) -> int | None:
    """The target's place from that side, the same in every frame; None where it is unclear or an object is out of view."""
    if not all(scene.objects[i].in_view.all() for i in rivals):
        return None
    gaps = [_along(scene, i, side) - _along(scene, target, side) for i in rivals if i != target]
    return rank_by_gaps(gaps, margin)


def rank_by_gaps(gaps: Sequence[np.ndarray], margin: float) -> int | None:
    """Number of rivals before a target, from each rival's signed distance behind it, (T,); None where any is unclear.

    It is unclear where the distance is less than the margin or changes its sign.
    """
    if any(np.abs(gap).min() < margin or np.ptp(np.sign(gap)) > 0 for gap in gaps):
        return None
    return sum(bool(gap[0] < 0) for gap in gaps)


def _is_beside(scene: Scene, index: int, anchor: int, side: str) -> bool | None:
    """Whether the object lies on that side of the anchor in every frame; None where it is unclear."""
    if not (scene.objects[index].in_view.all() and scene.objects[anchor].in_view.all()):
        return None
    gap = _along(scene, anchor, side) - _along(scene, index, side)
    if gap.min() > 0.08:
        return True
    return False if gap.max() < -0.02 else None


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, f"{noun}s")
