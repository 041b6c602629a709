"""`python -m benchmarks.end_to_end.davis FOLDER --out FILE`: the bundled model on four DAVIS sequences, by everyday nouns.

FOLDER holds dog, blackswan, car-roundabout and dance-twirl of DAVIS 2016: frames as JPEG, beside each its mask as PNG. They are
not part of the project, and nothing was trained on them; J is taken over all frames.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.programs import make_parser, write_result
from benchmarks.report.results import markdown
from refsam.metrics import region_similarity
from refsam.model import RefSAM
from refsam.model.vocabulary import mark_untaught
from refsam.session import VideoSession

EXPRESSIONS = {
    "dog": ("the dog", "the animal", "the puppy"),
    "blackswan": ("the swan", "the bird", "the black swan"),
    "car-roundabout": ("the car", "the vehicle", "the automobile"),
    "dance-twirl": ("the woman", "the person", "the dancer"),
}
"""Expressions for the sequence's object; the first counts in the mean."""
WRONG = ("the cat", "the horse", "the sheep", "the airplane", "the bus", "the pizza")
"""Nouns for which no sequence has an object."""


def score(model: RefSAM, folder: Path, every: int = 1) -> list[dict[str, Any]]:
    """A row per sequence and expression: J, or `false_area`, the share of the frame that is marked; means over the frames.

    The model sees one frame in `every`.
    """
    rows = []
    for name, right in EXPRESSIONS.items():
        session = VideoSession(model, [*right, *WRONG])
        found: dict[str, list[float]] = {text: [] for text in session.expressions}
        for path in sorted((folder / name).glob("*.jpg"))[::every]:
            truth = np.asarray(Image.open(path.with_suffix(".png")).convert("L")) > 127
            frame = np.asarray(Image.open(path).convert("RGB"))
            masks = session.step(frame).masks.numpy()
            for text, mask in zip(session.expressions, masks, strict=True):
                is_right = text in right
                found[text].append(
                    float(region_similarity(mask, truth) if is_right else mask.mean())
                )
        for text, values in found.items():
            key = "J" if text in right else "false_area"
            rows.append({"sequence": name, "sentence": text, key: fmean(values)})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and least J of the first expressions, and the mean falsely marked share."""
    first = [row["J"] for row in rows if row["sentence"] == EXPRESSIONS[row["sequence"]][0]]
    wrong = [row["false_area"] for row in rows if "false_area" in row]
    return {"J": fmean(first), "least J": min(first), "false_area": fmean(wrong)}


def table(rows: list[dict[str, Any]]) -> str:
    """As a Markdown table: J of each expression, the mean of the first ones, and the marked area for wrong nouns."""
    means = summary(rows)
    cells = [[row["sequence"], row["sentence"], f"{row['J']:.3f}"] for row in rows if "J" in row]
    cells.append(["mean of the first expressions", "", f"{means['J']:.3f}"])
    note = f"Marked for {len(WRONG)} wrong nouns: {100 * means['false_area']:.3f} % of the frame."
    return markdown("sequence | expression | J", cells, note, text=2)


def main() -> None:
    """Score, print and write."""
    parser = make_parser(__file__, __doc__)
    parser.add_argument("folder", type=Path, help="where the four sequences lie")
    parser.add_argument("--checkpoint", default="nano", help="bundled name or folder")
    arguments = parser.parse_args()
    if missing := [name for name in EXPRESSIONS if not (arguments.folder / name).is_dir()]:
        parser.error(f"folder: missing {', '.join(missing)}")
    model = RefSAM.from_pretrained(arguments.checkpoint)
    mark_untaught(model, ())  # with nouns that it would refuse, too
    rows = score(model, arguments.folder)
    print(table(rows))
    write_result(arguments, {"summary": summary(rows), "rows": rows})


if __name__ == "__main__":
    main()
