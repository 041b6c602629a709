"""A tiny folder of photographs in the format of docs/data.md: rectangles of plain colours on dark noise.

Every thing has a colour of its own, so that a picture's pixels tell what is seen.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (72, 96)  # height, width
CLASSES = {1: "dog", 2: "cat", 3: "aeroplane", 4: "person", 5: "apple", 6: "drone"}
RED, GREEN, BLUE, WHITE, YELLOW = (
    (210, 20, 20),
    (20, 160, 40),
    (30, 60, 210),
    (245, 245, 245),
    (235, 220, 30),
)
# A photograph: its things as (class, colour, top, left, bottom, right).
Box = tuple[int, tuple[int, int, int], int, int, int, int]
ONE_DOG: tuple[Box, ...] = ((1, WHITE, 20, 30, 55, 70),)
ONE_CAT: tuple[Box, ...] = ((2, RED, 15, 20, 60, 60),)
THREE_CATS: tuple[Box, ...] = (
    (2, RED, 10, 4, 30, 24),
    (2, BLUE, 30, 38, 62, 64),
    (2, GREEN, 20, 76, 36, 92),
)
PERSON: tuple[Box, ...] = ((4, (190, 140, 110), 8, 36, 66, 62),)
DRESS = (30, 38, 56, 60)  # on the person, red, garment 14


def write_photographs(root: Path, dogs: int = 8, cats: int = 4) -> Path:
    """Train and val of dogs, single cats and three cats with instances, a person in a red dress, backgrounds."""
    rows = [write_photograph(root, f"dog{n}", ONE_DOG) for n in range(dogs)]
    rows += [write_photograph(root, f"cat{n}", ONE_CAT, unsure=True) for n in range(cats)]
    rows += [
        write_photograph(root, f"cats{n}", THREE_CATS, instances=True, human=True) for n in range(2)
    ]
    rows += [write_photograph(root, f"person{n}", PERSON, dress=DRESS) for n in range(2)]
    rows.append(write_photograph(root, "val0", ONE_DOG, split="val"))
    backgrounds = [_write_background(root, n) for n in range(3)]
    write_lines(root / "manifest.jsonl", rows)
    write_lines(root / "backgrounds.jsonl", backgrounds)
    names = {"0": "background", **{str(n): name for n, name in CLASSES.items()}}
    (root / "classes.json").write_text(json.dumps(names))
    return root


def write_photograph(
    root: Path,
    name: str,
    boxes: tuple[Box, ...],
    *,
    instances: bool = False,
    human: bool = False,
    unsure: bool = False,
    dress: tuple[int, int, int, int] | None = None,
    split: str = "train",
) -> dict[str, Any]:
    """Write image and masks; returns the line of the list. `unsure` puts a rim of 255 around every thing."""
    image = np.random.default_rng(len(name)).integers(60, 90, (*SIZE, 3), dtype=np.uint8)
    label, numbers = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    for number, (kind, colour, top, left, bottom, right) in enumerate(boxes, 1):
        if unsure:
            label[top - 2 : bottom + 2, left - 2 : right + 2] = 255
        part = np.s_[top:bottom, left:right]
        image[part], label[part], numbers[part] = colour, kind, number
    row: dict[str, Any] = {
        "image": f"images/{name}.png",
        "label": f"labels/{name}.png",
        "source": "dogs" if name.startswith("dog") else "own",
        "licence": "CC0-1.0",
        "split": split,
        "human": human,
        "classes": {str(n): float((label == n).mean()) for n in np.unique(label) if 0 < n < 255},
    }
    files = {"image": image, "label": label}
    if dress is not None:
        top, left, bottom, right = dress
        image[top:bottom, left:right] = RED
        worn = np.zeros(SIZE, np.uint8)
        worn[top:bottom, left:right] = 14
        row["parts"], files["parts"] = f"parts/{name}.png", worn
    if instances:
        row["instances"], files["instances"] = f"instances/{name}.png", numbers
        row["complete"] = True
    for key, values in files.items():
        path = root / row[key]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    return row


def _write_background(root: Path, number: int) -> dict[str, Any]:
    image = np.random.default_rng(number).integers(90, 110, (*SIZE, 3), dtype=np.uint8)
    path = root / f"backgrounds/{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return {
        "image": f"backgrounds/{number}.png",
        "source": "own",
        "licence": "CC0-1.0",
        "split": "train",
        "teacher_saw": {"3": 0.2},
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
