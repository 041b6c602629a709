"""A folder of photographs with class masks: `images/`, `labels/`, `instances/`, `parts/`, and lists of these files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refsam.data.dataset import DataError, image_size, read_image
from refsam.data.masks import read_numbers
from refsam.data.photographs.words import Words, load_words, split_words

UNSURE = 255
"""In labels: nobody knows what is there; in instances: a crowd, or objects that could not be told apart."""

# The numbers 1 to 58 in `parts/`: the garments of the Clothing Co-Parsing set, under its own names.
PARTS = (
    "accessories bag belt blazer blouse bodysuit boots bra bracelet cape cardigan clogs coat dress earrings flats glasses "
    "gloves hair hat heels hoodie intimate jacket jeans jumper leggings loafers necklace panties pants pumps purse ring romper "
    "sandals scarf shirt shoes shorts skin skirt sneakers socks stockings suit sunglasses sweater sweatshirt swimwear t-shirt "
    "tie tights top vest wallet watch wedges"
).split()
_PARTS_AS = {"bag": "handbag", **dict.fromkeys(("clogs", "flats", "pumps", "wedges"), "shoes")}


@dataclass(frozen=True)
class Photograph:
    """A line of `manifest.jsonl`: the files, relative to the folder, and facts about them.

    `classes` has the share of the area that each class covers, by the word list's name. `complete`: every object of the folder's
    classes is labelled; otherwise things without a label may be seen. `human`: people drew the masks.
    """

    image: str
    label: str
    instances: str | None
    parts: str | None
    source: str
    classes: Mapping[str, float]
    complete: bool
    human: bool
    size: tuple[int, int]


@dataclass(frozen=True)
class BackgroundPhotograph:
    """A line of `backgrounds.jsonl`: a photograph without the classes; `mistaken`, those that a model wrongly saw in it."""

    image: str
    mistaken: tuple[str, ...]


@dataclass(frozen=True)
class PhotoFolder:
    """One split of a folder of photographs. Pixels are read when they are asked for; instances can be pickled."""

    root: Path
    split: str
    names: Mapping[int, str]
    photographs: tuple[Photograph, ...]
    backgrounds: tuple[BackgroundPhotograph, ...]
    words: Words = field(default_factory=load_words)

    @cached_property
    def by_class(self) -> dict[str, list[int]]:
        """Photographs, by number, that show each class on one per cent of their area or more."""
        found: dict[str, list[int]] = {}
        for number, photograph in enumerate(self.photographs):
            for name, share in photograph.classes.items():
                if share >= 0.01:
                    found.setdefault(name, []).append(number)
        return dict(sorted(found.items()))

    @cached_property
    def garments(self) -> dict[int, str]:
        """The numbers in `parts/` that mean a garment of the word list, by its name."""
        named = ((n, _PARTS_AS.get(name, name)) for n, name in enumerate(PARTS, 1))
        return {n: meant[0] for n, name in named if len(meant := self.words.meaning(name)) == 1}

    def vocabulary(self) -> list[str]:
        """Every single word that an expression about these photographs can hold beside those of generated clips."""
        return sorted({*self.words.vocabulary(), *split_words(" ".join(self.names.values()))})

    def image(self, name: str) -> NDArray[np.uint8]:
        """An image (H, W, 3) uint8 RGB by its name in a list; raises UnreadableError."""
        return np.asarray(read_image(self.root / name)[0])

    def map(self, name: str) -> NDArray[np.uint8]:
        """Labels, instances or parts (H, W) uint8 by their name in a list; raises UnreadableError."""
        return read_numbers(self.root / name)


def open_folder(root: str | Path, split: str) -> PhotoFolder:
    """The photographs of a split under `root`, laid out as docs/data.md says; raises DataError."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"photographs: no folder {root}; docs/data.md says what it must hold")
    words = load_words()
    names = read_names(root / "classes.json")
    rows = [row for row in read_lines(root / "manifest.jsonl") if row.get("split") == split]
    if not rows:
        raise DataError(f"{root / 'manifest.jsonl'}: no photograph of the split {split!r}")
    backgrounds = root / "backgrounds.jsonl"
    others = list(read_lines(backgrounds)) if backgrounds.is_file() else []
    classes = {number: words.class_of(name) for number, name in names.items()}
    return PhotoFolder(
        root,
        split,
        classes,
        tuple(_photograph(root, row, classes) for row in rows),
        tuple(
            BackgroundPhotograph(
                row["image"], tuple(classes[int(c)] for c in row.get("teacher_saw", ()))
            )
            for row in others
            if row.get("split", split) == split
        ),
    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; raises DataError that names a line without one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: got {line[:40]!r}, want an object")
        yield row


def read_names(path: Path) -> dict[int, str]:
    """The classes by number, without the background's 0; raises DataError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {int(number): str(name) for number, name in values.items() if int(number)}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f'{path}: cannot be read as {{"1": "aeroplane", ...}} ({error})') from None


def _photograph(root: Path, row: dict[str, Any], classes: Mapping[int, str]) -> Photograph:
    try:
        counted = row["classes"] if "classes" in row else _count(root / row["label"])
        shares = _shares(counted, classes)
        human = bool(row.get("human", False))
        if "width" in row and "height" in row:
            size = int(row["height"]), int(row["width"])
        else:
            size = image_size(root / row["image"])
        return Photograph(
            row["image"],
            row["label"],
            row.get("instances"),
            row.get("parts"),
            row.get("source", ""),
            shares,
            bool(row.get("complete", human and "objects" in row)),
            human,
            size,
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{root / 'manifest.jsonl'}: {row.get('image', row)}: {reason}; refsam data check tells all"
        ) from None


def _shares(shares: Mapping[Any, float], classes: Mapping[int, str]) -> dict[str, float]:
    """Shares of the area by the word list's name; two numbers of one name add up."""
    found: dict[str, float] = {}
    for number, share in shares.items():
        if int(number) not in classes:
            raise ValueError(f"class {number} is not in classes.json")
        name = classes[int(number)]
        found[name] = found.get(name, 0.0) + float(share)
    return found


def _count(path: Path) -> dict[int, float]:
    """The share of the area of each class in a label map."""
    labels = read_numbers(path)
    counts: Sequence[int] = np.bincount(labels.ravel(), minlength=256).tolist()
    return {n: c / labels.size for n, c in enumerate(counts) if c and n not in (0, UNSURE)}
