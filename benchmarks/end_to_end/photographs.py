"""`python -m benchmarks.end_to_end.photographs FOLDER --out FILE`: the bundled model on real photographs, class by class.

FOLDER is laid out as docs/data.md says; of its split `val`, the masks that people drew are seen. Each class on at least one per
cent of a photograph is asked for as "the horse", or "the horses" where several are told apart; unsure pixels do not count.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.programs import make_parser, write_result
from benchmarks.report.results import markdown
from refsam.data.photographs.folder import UNSURE, PhotoFolder, Photograph, open_folder
from refsam.model import RefSAM
from refsam.model.vocabulary import mark_untaught
from refsam.session import VideoSession

SMALLEST = 0.01  # of the photograph
# Asked for where the label has none of them; furniture and vessels are left out, because not every source labels them.
ABSENT = ("cat", "cow", "sheep", "elephant", "airplane", "train", "pizza", "toothbrush")
_WIDELY_DRAWN = ("person", "horse")


def score(model: RefSAM, folder: PhotoFolder) -> list[dict[str, Any]]:
    """A row per question: source, expression and class, and J, or `false_area` where the expression means nothing."""
    rows = []
    number = {name: value for value, name in folder.names.items()}
    for photograph in folder.photographs:
        if not photograph.human:
            continue
        sure = (label := folder.map(photograph.label)) != UNSURE
        asked = {name: _expression(folder, photograph, name, number) for name in _seen(photograph)}
        absent = [name for name in ABSENT if name not in photograph.classes]
        texts = [*asked.values(), *(f"the {name}" for name in absent)]
        masks = VideoSession(model, texts).step(folder.image(photograph.image)).masks.numpy()
        for name, mask in zip([*asked, *absent], masks, strict=True):
            row: dict[str, Any] = {"source": photograph.source, "class": name}
            if name in asked:
                truth = label == number[name]
                union = ((mask | truth) & sure).sum()
                row |= {"sentence": asked[name], "J": float((mask & truth).sum() / max(1, union))}
            else:
                row["false_area"] = float(mask.mean())
            rows.append(row)
    return rows


def _seen(photograph: Photograph) -> list[str]:
    return sorted(name for name, share in photograph.classes.items() if share >= SMALLEST)


def _expression(
    folder: PhotoFolder, photograph: Photograph, name: str, number: dict[str, int]
) -> str:
    """The class by its noun, in the plural where several of it are told apart."""
    noun = folder.words.about(name)[0]
    if photograph.instances is None:
        return f"the {noun.word}"
    objects = folder.map(photograph.instances)[folder.map(photograph.label) == number[name]]
    return f"the {noun.plural if _several(objects) else noun.word}"


def _several(objects: NDArray[np.uint8]) -> bool:
    return len(np.unique(objects[(objects > 0) & (objects < UNSURE)])) > 1


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers of questions, mean J by class and source, over COCO's classes, and the falsely marked share."""
    groups: dict[str, list[float]] = {name: [] for name in (*_WIDELY_DRAWN, "coco")}
    for row in rows:
        if "J" in row:
            of_coco = row["source"] == "coco"
            name = "coco" if of_coco else row["class"]
            groups.setdefault(name, []).append(row["J"])
    found = [{"of": n, "number": len(js), "J": fmean(js)} for n, js in groups.items() if js]
    nouns: dict[str, list[float]] = {}
    for row in rows:
        if "J" in row and row["source"] == "coco":
            nouns.setdefault(f"coco: {row['class']}", []).append(row["J"])
    found += [{"of": n, "number": len(js), "J": fmean(js)} for n, js in sorted(nouns.items())]
    areas = [row["false_area"] for row in rows if "false_area" in row]
    return [*found, {"of": "absent", "number": len(areas), "false_area": fmean(areas)}]


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    *present, absent = rows
    cells = ([row["of"], str(row["number"]), f"{row['J']:.3f}"] for row in present)
    area = f"{100 * absent['false_area']:.3f} % ({absent['number']} absent nouns)"
    return markdown("asked for | number | J", cells, f"Falsely marked: {area}.")


def main() -> None:
    """Score, print and write."""
    parser = make_parser(__file__, __doc__)
    parser.add_argument("folder", type=Path, help="a folder of photographs with class masks")
    parser.add_argument("--checkpoint", default="nano", help="bundled name or folder")
    arguments = parser.parse_args()
    model = RefSAM.from_pretrained(arguments.checkpoint)
    mark_untaught(model, ())  # which nouns it refuses is decided by this measurement
    rows = score(model, open_folder(arguments.folder, "val"))
    result = summary(rows)
    print(table(result))
    write_result(arguments, {"summary": result, "rows": rows})


if __name__ == "__main__":
    main()
