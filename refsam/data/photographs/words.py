"""The nouns that photographs teach, with their meanings from `words.csv`."""

import csv
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from refsam.data.generated.grammar import everyday_words, vocabulary

Role = Literal["class", "garment", "synonym", "kind", "group"]
_ROLES = get_args(Role)


@dataclass(frozen=True)
class Noun:
    """A row of the list: a word, its plural, and the classes that it means in training.

    `role`: a `class` or a `garment` names itself; a `synonym` says the same as another word; a `kind` is narrower than its class
    ("puppy"), which the masks do not tell apart, so it means the class; a `group` means each of its classes ("animal").
    """

    word: str
    plural: str
    role: Role
    classes: tuple[str, ...]


class Words:
    """The list of nouns, by word and by class; a name that it lacks is its own noun, with a plural in s."""

    def __init__(self, nouns: Iterable[Noun]) -> None:
        self.nouns = tuple(nouns)
        self._by_word = {noun.word: noun for noun in self.nouns}
        self._by_class: dict[str, list[Noun]] = {}
        for noun in self.nouns:
            for name in noun.classes:
                self._by_class.setdefault(name, []).append(noun)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all classes of things, garments left out."""
        return tuple(noun.word for noun in self.nouns if noun.role == "class")

    @property
    def garments(self) -> tuple[str, ...]:
        """The names of all garments."""
        return tuple(noun.word for noun in self.nouns if noun.role == "garment")

    def class_of(self, name: str) -> str:
        """The class that a name in somebody's `classes.json` stands for: "aeroplane" for airplane; an unknown name for itself."""
        noun = self._by_word.get(name.lower())
        if noun is None or noun.role in ("group", "kind"):
            return name.lower()
        return noun.classes[0]

    def about(self, name: str) -> list[Noun]:
        """All nouns that are true of a class, its own name first."""
        return self._by_class.get(name) or [Noun(name, f"{name}s", "class", (name,))]

    def meaning(self, word: str) -> tuple[str, ...]:
        """The classes that a word, singular or plural, means; none if the list lacks it."""
        for noun in self.nouns:
            if word in (noun.word, noun.plural):
                return noun.classes
        return ()

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Other classes that share a group with this one, for which it is most easily taken."""
        groups = (noun for noun in self.about(name) if noun.role == "group")
        return tuple(dict.fromkeys(c for noun in groups for c in noun.classes if c != name))

    def relatives(self) -> dict[str, tuple[str, ...]]:
        """For each single word of the list, single words of similar meaning: other names and plurals of its classes."""
        found: dict[str, dict[str, None]] = {}
        for noun in self.nouns:
            others = (n for name in noun.classes for n in self.about(name) if n.role != "group")
            names = [noun.word, noun.plural, *noun.classes, *(n.word for n in others)]
            alike = [part for name in names for part in split_words(name)[-1:]]
            for word in split_words(f"{noun.word} {noun.plural}"):
                found.setdefault(word, {}).update(dict.fromkeys(w for w in alike if w != word))
        return {word: tuple(alike) for word, alike in found.items()}

    def vocabulary(self) -> list[str]:
        """Every single word of the list, sorted."""
        phrases = " ".join(f"{noun.word} {noun.plural}" for noun in self.nouns)
        return sorted(set(split_words(phrases)))


def untaught_words(taught: Collection[str]) -> tuple[str, ...]:
    """The single words that name things, in generated expressions or about photographs, but none of the classes `taught`.

    Words that mean something else as well, such as "orange" or "ring", are not among them.
    """
    nouns = load_words().nouns
    known = {
        word
        for noun in nouns
        if set(noun.classes) & set(taught)
        for word in split_words(f"{noun.word} {noun.plural}")
    }
    named = {*load_words().vocabulary(), *everyday_words()}
    return tuple(sorted(named - known - (set(vocabulary()) - set(everyday_words()))))


def split_words(text: str) -> list[str]:
    """Single words, as the small text encoder's tokenizer takes them."""
    return re.findall(r"\w+", text.lower())


@cache
def load_words() -> Words:
    """The list in `words.csv`; raises ValueError where a row is not in its format."""
    text = files("refsam.data.photographs").joinpath("words.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    found: dict[str, Noun] = {}
    for row in rows:
        word, role = row["word"], row["role"]
        named = [part.strip() for part in row["of"].split(";") if part.strip()]
        if role not in _ROLES or word in found or (role in ("class", "garment")) == bool(named):
            raise ValueError(f"words.csv: {row}: want one row a word, and what it is of")
        unknown = [name for name in named if name not in found]
        if unknown:
            raise ValueError(f"words.csv: {word} is of {', '.join(unknown)}, which no row above is")
        classes = tuple(c for name in named for c in found[name].classes) or (word,)
        found[word] = Noun(word, row["plural"], role, classes)  # type: ignore[arg-type]
    return Words(found.values())
