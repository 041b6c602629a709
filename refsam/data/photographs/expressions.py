"""Expressions about a clip of photographs, with their masks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from refsam.data.generated.grammar import (
    COLOUR_WORDS,
    ORDINALS,
    SIDE_WORDS,
    SIZE_WORDS,
    TEMPLATES,
    rank_by_gaps,
)
from refsam.data.photographs.colours import colour_of, colours_without
from refsam.data.photographs.folder import UNSURE, PhotoFolder
from refsam.data.photographs.layers import PhotoClip
from refsam.data.photographs.words import Noun

Item = TypeVar("Item")
# How often each kind of expression about things that are present is tried.
_KINDS = {
    "class": 0.34, "group": 0.08, "colour": 0.14, "position": 0.14, "size": 0.08, "order": 0.1, "garment": 0.12, "wearer": 0.1,
}  # fmt: skip
_ABSENT = 1 / 3  # share of all expressions
_SEEN_PIXELS = 40  # an object with fewer pixels counts as not seen
_RANKED_SHARE = 0.002  # share of the frame that an object must cover if its place or size is named
_GAP = 0.07  # of the frame: least distance between objects whose order is named
_STANDS_OUT = 1.7  # among several dogs "the dog" must have this many times the area of any other
_RATIO = 1.5  # least ratio between the areas of objects whose size is named
# A class that at least this share of a folder's photographs show has a label wherever it is seen, if it is a person or belongs to
# a group below. Objects of other classes may be seen without a label.
_FREQUENT = 0.005
_NOTICED = ("animal", "vehicle", "fruit")
# Worn things that do not tell a person.
_UNTELLING = ("hair", "watch", "bracelet", "necklace", "belt", "socks")


@dataclass(frozen=True)
class PhotoExpression:
    """An expression, its kind, its `mask`, and `ignore`: pixels where the mask is not known, both (T, H, W) bool."""

    text: str
    kind: str
    mask: NDArray[np.bool_]
    ignore: NDArray[np.bool_]


class PhotoGrammar:
    """Draws expressions about one clip."""

    def __init__(self, random: np.random.Generator, folder: PhotoFolder, clip: PhotoClip) -> None:
        self.random = random
        self.folder = folder
        self.words = folder.words
        self.clip = clip
        self.unsure = clip.owner == UNSURE
        counts = [np.bincount(frame.ravel(), minlength=256) for frame in clip.owner]
        self.counts = np.stack(counts)
        numbers = range(1, len(clip.things) + 1)
        self.seen = [n for n in numbers if self.counts[:, n].max() >= _SEEN_PIXELS]
        self.present = {thing.name for thing in clip.things}
        self._colours: dict[int, str | None] = {}

    def draw(self, count: int) -> list[PhotoExpression]:
        """Draw `count` expressions, a third of them about things that are absent."""
        found: list[PhotoExpression] = []
        while len(found) < count:
            is_absent = self.random.random() < _ABSENT
            expression = self._absent() if is_absent else self._true()
            found.append(expression or self._absent())
        return found

    def _true(self) -> PhotoExpression | None:
        if not self.seen:
            return None
        shares = np.array(list(_KINDS.values()))
        for kind in self.random.choice(list(_KINDS), 4, p=shares / shares.sum()):
            expression = getattr(self, f"_{kind}")()
            if expression is not None:
                return expression
        return self._class()

    # Present objects

    def _class(self) -> PhotoExpression | None:
        name = self.clip.things[self._pick(self.seen) - 1].name
        return self._named(self._noun(name), "class", self._members((name,)))

    def _group(self) -> PhotoExpression | None:
        name = self.clip.things[self._pick(self.seen) - 1].name
        groups = [noun for noun in self.words.about(name) if noun.role == "group"]
        if not groups:
            return None
        noun = self._pick(groups)
        if not self.clip.complete and set(noun.classes) - set(self._noticed):
            return None
        return self._named(noun, "group", self._members(noun.classes))

    def _named(self, noun: Noun, kind: str, members: list[int]) -> PhotoExpression:
        """ "The dog" for the only one or for one that stands out, "the dogs" for all."""
        if len(members) == 1 and self.clip.things[members[0] - 1].single:
            meant, others = members, list[int]()
        else:
            meant, others = self._standing_out(members)
        if not meant or (len(members) > 1 and self.random.random() < 0.5):
            text = self._say("plural", nps=noun.plural, np=noun.word)
            return self._expression(text, kind, members)
        return self._expression(self._say("plain", np=noun.word), kind, meant, others)

    def _standing_out(self, members: list[int]) -> tuple[list[int], list[int]]:
        """The one thing that is by far the largest in every frame, if there is one, and pieces that may belong to it."""
        pieces = [n for n in members if not self.clip.things[n - 1].single]
        for n in members:
            others = [m for m in members if m != n]
            if (
                n not in pieces
                and (self.counts[:, n] > _STANDS_OUT * self.counts[:, others].max(1)).all()
            ):
                return [n], pieces
        return [], []

    def _colour(self) -> PhotoExpression | None:
        number = self._pick(self.seen)
        name = self.clip.things[number - 1].name
        colour = self.colour_of(number)
        if colour is None or name == "person":
            return None
        alike, others = [], []
        for n in self._members((name,)):
            own = self.colour_of(n)
            if own == colour:
                alike.append(n)
            elif own is None or not self.clip.things[n - 1].single:
                others.append(n)  # may have that colour in part: ignored
        noun = self._noun(name)
        word = noun.plural if len(alike) > 1 else noun.word
        phrase = f"{self._pick(COLOUR_WORDS[colour])} {word}"
        if self.random.random() < 0.2 and len(alike) == 1:
            c = self._pick(COLOUR_WORDS[colour])
            text = self._say("coloured", c=c, n=noun.word)
        else:
            text = self._say("plain", np=phrase)
        return self._expression(text, "colour", alike, others)

    def _position(self) -> PhotoExpression | None:
        return self._compared("position", self._side_words)

    def _order(self) -> PhotoExpression | None:
        return self._compared("order", self._order_words)

    def _size(self) -> PhotoExpression | None:
        return self._compared("size", self._size_words)

    def _compared(
        self, kind: str, compare: Callable[[int, list[int]], dict[str, str] | None]
    ) -> PhotoExpression | None:
        """A target told from its rivals, single objects of its class that are all well in view, by the words of `compare`."""
        target = self._pick(self.seen)
        name = self.clip.things[target - 1].name
        rivals, noun = self._members((name,)), self._noun(name)
        if len(rivals) < 2 or not self.are_in_view(rivals):
            return None
        words = compare(target, rivals)
        if words is None:
            return None
        return self._expression(self._say(kind, np=noun.word, **words), kind, [target])

    def _side_words(self, target: int, rivals: list[int]) -> dict[str, str] | None:
        for side in self.random.permutation(list(SIDE_WORDS)):
            if self.rank(target, rivals, side) == 0:
                return {"side": str(side), "sidemost": self._pick(SIDE_WORDS[side])}
        return None

    def _order_words(self, target: int, rivals: list[int]) -> dict[str, str] | None:
        for side in self.random.permutation(["left", "right", "left", "right", "top", "bottom"]):
            rank = self.rank(target, rivals, side)
            if rank is not None and rank < len(ORDINALS) and (rank or self.random.random() < 0.3):
                return {"side": str(side), "ordinal": ORDINALS[rank]}
        return None

    def _size_words(self, target: int, rivals: list[int]) -> dict[str, str] | None:
        extreme = self.extreme(target, rivals)
        return None if extreme is None else {"size": self._pick(SIZE_WORDS[extreme])}

    def _garment(self) -> PhotoExpression | None:
        found = self._garments()
        if not found:
            return None
        name = self._pick(list(found))
        mask = found[name]
        noun = self._noun(name)
        colour = colour_of(self.clip.frames[mask])
        phrase = noun.word
        if colour is not None and self.random.random() < 0.6:
            phrase = f"{self._pick(COLOUR_WORDS[colour])} {phrase}"
        text = self._say("plain", np=phrase)
        return PhotoExpression(text, "garment", mask, self.unsure & ~mask)

    def _wearer(self) -> PhotoExpression | None:
        """ "The woman in the red dress": the person who wears it, where only one person is seen."""
        persons = self._members(("person",))
        found = {n: mask for n, mask in self._garments().items() if n not in _UNTELLING}
        if len(persons) != 1 or not found:
            return None
        name = self._pick(list(found))
        colour = colour_of(self.clip.frames[found[name]])
        worn = self._noun(name).word
        if colour is not None and self.random.random() < 0.7:
            worn = f"{self._pick(COLOUR_WORDS[colour])} {worn}"
        elif self.random.random() < 0.6:
            worn = f"the {worn}"
        link = self._pick(("in", "in a", "wearing", "wearing a", "with the", "in the", "with a"))
        worn = worn.removeprefix("the ") if link.endswith((" a", " the")) else worn
        return self._expression(f"the {self._noun('person').word} {link} {worn}", "wearer", persons)

    # Absent objects

    def _absent(self) -> PhotoExpression:
        """Mostly a noun similar to one that is present, or often mistaken for it; else a present object in a wrong colour."""
        if self.seen and self.random.random() < 0.2 and (wrong := self._wrong_colour()):
            return wrong
        names = self.words.classes if self.clip.complete else self._noticed
        absent = [name for name in names if name not in self.present]
        absent = absent or [name for name in self.words.classes if name not in self.present]
        close = (other for name in sorted(self.present) for other in self.words.neighbours(name))
        near = {*self.clip.mistaken, *close}
        hard = [name for name in absent if name in near]
        frequent = [name for name in absent if name in self._frequent]
        for choices, share in ((hard, 0.5), (frequent, 0.6), (absent, 1.0)):
            if choices and self.random.random() < share:
                break
        name = self._pick(choices)
        nouns = [n for n in self.words.about(name) if not set(n.classes) & self.present]
        noun = self._pick(nouns or [Noun(name, f"{name}s", "class", (name,))])
        phrase = noun.word
        if self.random.random() < 0.25:
            phrase = f"{self._pick(COLOUR_WORDS[self._pick(list(COLOUR_WORDS))])} {phrase}"
        template = self._pick(("plain", "plain", "plain", "position", "size", "plural"))
        side = self._pick(list(SIDE_WORDS))
        text = self._pick(TEMPLATES[template][0]).format(
            np=phrase, nps=noun.plural, side=side, sidemost=self._pick(SIDE_WORDS[side]),
            size=self._pick(SIZE_WORDS[self._pick(list(SIZE_WORDS))]),
        )  # fmt: skip
        return PhotoExpression(text, "absent", np.zeros_like(self.unsure), self.unsure)

    def _wrong_colour(self) -> PhotoExpression | None:
        name = self.clip.things[self._pick(self.seen) - 1].name
        members = self._members((name,))
        if name == "person" or not all(self.clip.things[n - 1].single for n in members):
            return None
        mask = self._shown(members)
        colours = colours_without(self.clip.frames[mask])
        if not colours:
            return None
        colour, noun = self._pick(COLOUR_WORDS[self._pick(colours)]), self._noun(name)
        text = self._say("plain", np=f"{colour} {noun.word}")
        return PhotoExpression(text, "absent", np.zeros_like(mask), self.unsure)

    @cached_property
    def _frequent(self) -> tuple[str, ...]:
        least = _FREQUENT * len(self.folder.photographs)
        return tuple(name for name, found in self.folder.by_class.items() if len(found) >= least)

    @cached_property
    def _noticed(self) -> tuple[str, ...]:
        """Classes that would have a label if a photograph showed them, even one that is not labelled completely."""
        told_apart = {c for group in _NOTICED for c in self.words.meaning(group)} | {"person"}
        return tuple(name for name in self._frequent if name in told_apart)

    # Helpers

    def _members(self, names: Sequence[str]) -> list[int]:
        return [n for n, thing in enumerate(self.clip.things, 1) if thing.name in names]

    def extreme(self, target: int, rivals: list[int]) -> str | None:
        """ "large" or "small" where the target is clearly so among its rivals in every frame."""
        others = np.stack([self.counts[:, n] for n in rivals if n != target])
        own = self.counts[:, target]
        if np.all(own > _RATIO * others.max(0)):
            return "large"
        return "small" if np.all(own < others.min(0) / _RATIO) else None

    def are_in_view(self, numbers: Sequence[int]) -> bool:
        """Whether all these things are single objects that can be seen well in every frame."""
        least = _RANKED_SHARE * self.clip.owner[0].size
        return all(
            self.clip.things[n - 1].single and self.counts[:, n].min() >= least for n in numbers
        )

    def rank(self, target: int, rivals: list[int], side: str) -> int | None:
        """The target's place from that side, the same in every frame; None where it is unclear."""
        axis = 1 if side in ("left", "right") else 0
        sign = 1 if side in ("left", "top") else -1
        own = self._middles(target, axis)
        gaps = [sign * (self._middles(n, axis) - own) for n in rivals if n != target]
        return rank_by_gaps(gaps, _GAP)

    def _shown(self, members: Sequence[int]) -> NDArray[np.bool_]:
        """Pixels (T, H, W) bool that show any of these things."""
        is_member = np.zeros(256, bool)
        is_member[list(members)] = True
        return is_member[self.clip.owner]

    def _middles(self, number: int, axis: int) -> NDArray[np.float64]:
        """Centre of a thing's pixels in each frame, as a share of the frame's height (axis 0) or width."""
        where = (self.clip.owner == number).sum(axis=2 - axis)
        length = where.shape[1]
        return where @ (np.arange(length) + 0.5) / np.maximum(where.sum(1), 1) / length

    def colour_of(self, number: int) -> str | None:
        """The one colour that a thing has where most of it is seen, None where no name is clear."""
        if number not in self._colours:
            frame = int(self.counts[:, number].argmax())
            pixels = self.clip.frames[frame][self.clip.owner[frame] == number]
            self._colours[number] = colour_of(pixels) if len(pixels) else None
        return self._colours[number]

    def _garments(self) -> dict[str, NDArray[np.bool_]]:
        """Garments well in view, by name, if those of all persons are labelled."""
        persons = self._members(("person",))
        if not persons or not set(persons) <= self.clip.garments_known:
            return {}
        on_person = self._shown(persons)
        found: dict[str, NDArray[np.bool_]] = {}
        for number in np.unique(self.clip.garments[on_person]):
            name = self.folder.garments.get(int(number))
            if name is not None:
                mask = on_person & (self.clip.garments == number)
                found[name] = found[name] | mask if name in found else mask
        least = 2 * _SEEN_PIXELS
        return {name: mask for name, mask in found.items() if mask.sum((1, 2)).max() >= least}

    def _noun(self, name: str) -> Noun:
        """Half of the time the class's own name, else one of its nouns; those early in the list are drawn more often."""
        nouns = [noun for noun in self.words.about(name) if noun.role != "group"]
        if self.random.random() < 0.5:
            return nouns[0]
        return nouns[int(len(nouns) * self.random.random() ** 2)]

    def _expression(
        self, text: str, kind: str, members: Sequence[int], others: Sequence[int] = ()
    ) -> PhotoExpression:
        """An expression for the pixels of `members`; those of `others` are ignored."""
        mask = self._shown(members)
        ignore = self.unsure | self._shown(others) if others else self.unsure
        return PhotoExpression(text, kind, mask, ignore)

    def _say(self, template: str, **words: str) -> str:
        return self._pick(TEMPLATES[template][0]).format(**words)

    def _pick(self, choices: Sequence[Item]) -> Item:
        return choices[int(self.random.integers(len(choices)))]
