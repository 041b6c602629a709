"""Ref-DAVIS17: converts its text annotations and DAVIS 2017 to the layout of Ref-YouTube-VOS, and reads that layout."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from refsam.data import ref_youtube_vos
from refsam.data.dataset import DataError, Expression, ReferringDataset
from refsam.data.listings import Part, check_split, demand, read_text
from refsam.data.new_folder import new_folder, place

ANNOTATORS = 4
# In the order of the four annotators.
_TEXT_FILES = (
    "Davis17_annot1.txt",
    "Davis17_annot1_full_video.txt",
    "Davis17_annot2.txt",
    "Davis17_annot2_full_video.txt",
)
# Names that the text annotations and DAVIS spell differently.
_NAMES = {"clasic-car": "classic-car", "dog-scale": "dogs-scale", "motor-bike": "motorbike"}
_DAVIS = (
    "https://davischallenge.org/davis2017/code.html (DAVIS-2017-Unsupervised-trainval-480p.zip)"
)
_TEXTS = (
    "https://www.mpi-inf.mpg.de/departments/computer-vision-and-machine-learning/research/video-segmentation/"
    "video-object-segmentation-with-language-referring-expressions (davis_text_annotations.zip)"
)
_PREPARE = "refsam data prepare-davis17, from "
OFFICIAL_VIDEOS = {"train": 60, "valid": 30}


def open_split(name: str, root: Path, split: str) -> ReferringDataset:
    """One split; each expression has its annotator, and those of one object follow each other."""
    check_split(name, split, OFFICIAL_VIDEOS)
    dataset = ref_youtube_vos.open_layout(name, root, split, parts(name, root, split))
    by_video = {
        video: tuple(_with_annotators(video, expressions))
        for video, expressions in dataset.expressions_by_video.items()
    }
    return replace(dataset, expressions_by_video=by_video)


def parts(name: str, root: Path, split: str) -> dict[str, Part]:
    """The files of a split."""
    return ref_youtube_vos.layout(
        root, split, _PREPARE + _TEXTS, _PREPARE + _DAVIS, _PREPARE + _DAVIS
    )


def _with_annotators(video: str, expressions: tuple[Expression, ...]) -> Iterable[Expression]:
    """Expression number 4 * object + annotator is that annotator's expression about that object."""
    ordered = sorted(expressions, key=lambda expression: int(expression.expression_id))
    for index, expression in enumerate(ordered):
        first = ordered[index - index % ANNOTATORS]
        if len(ordered) % ANNOTATORS or expression.object_ids != first.object_ids:
            raise DataError(
                f"ref-davis17: {video} does not have {ANNOTATORS} consecutive expressions for each object"
            )
        yield replace(expression, annotator=index % ANNOTATORS)


def prepare(davis: Path, texts: Path, out: Path, *, copy: bool = False) -> dict[str, int]:
    """Write the layout of Ref-YouTube-VOS into the new folder `out`; returns the number of expressions of each split.

    `davis` is the folder with JPEGImages, Annotations_unsupervised and ImageSets, `texts` the one with the four text files.
    Frames and masks become symbolic links, or copies with `copy`; DAVIS itself stays as it is. Raises DataError where files
    are missing or disagree, and where `out` exists, UserError while another process writes it.
    """
    with new_folder(out) as partial:
        return _prepare(davis, texts, partial, copy)


def _prepare(davis: Path, texts: Path, out: Path, copy: bool) -> dict[str, int]:
    for part in ("JPEGImages/480p", "Annotations_unsupervised/480p", "ImageSets/2017"):
        demand("DAVIS 2017", davis / part, _DAVIS)
    annotations = [_read_texts(texts / name) for name in _TEXT_FILES]
    counts = {}
    for split, listed in (("train", "train"), ("valid", "val")):
        names = demand("DAVIS 2017", davis / "ImageSets/2017" / f"{listed}.txt", _DAVIS)
        videos = {v: _video(davis, v, annotations) for v in sorted(names.read_text().split())}
        for video in videos:
            for source in ("JPEGImages", "Annotations_unsupervised"):
                files = demand("DAVIS 2017", davis / source / "480p" / video, _DAVIS)
                place(files, out / split / source.removesuffix("_unsupervised") / video, copy)
        listing = parts("ref-davis17", out, split)["expressions"].path
        listing.parent.mkdir(parents=True)
        listing.write_text(json.dumps({"videos": videos}), encoding="utf-8")
        counts[split] = sum(len(video["expressions"]) for video in videos.values())
    return counts


Texts = dict[str, list[tuple[str, str]]]


def _read_texts(path: Path) -> Texts:
    """(object number, expression) by video, sorted by number as text, as the official conversion does it."""
    found: Texts = {}
    # The second person's files are not UTF-8.
    text = read_text(demand("ref-davis17", path, _TEXTS), "latin-1")
    # Only these end a line: splitlines() would also split at byte 0x85, an ellipsis in Windows' encoding.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < 3 or not words[1].isdigit():
            raise DataError(f'{path}, line {number}: got {line!r}, want VIDEO NUMBER "EXPRESSION"')
        video = _NAMES.get(words[0], words[0])
        found.setdefault(video, []).append((words[1], _unquoted(" ".join(words[2:]))))
    return {video: sorted(rows, key=lambda row: row[0]) for video, rows in found.items()}


def _unquoted(expression: str) -> str:
    """The expression without quotes around it, straight or typographic."""
    return re.sub(r'^["\u201c\u201d]|["\u201c\u201d]$', "", expression).strip()


def _video(davis: Path, video: str, annotations: list[Texts]) -> dict[str, Any]:
    """The entry of `meta_expressions.json`: frames, and for each object the expressions of the four annotators."""
    rows = [texts.get(video, []) for texts in annotations]
    numbers = [[number for number, _ in row] for row in rows]
    if not numbers[0] or any(other != numbers[0] for other in numbers):
        raise DataError(
            f"ref-davis17: the four text files name other objects for {video}: {numbers}"
        )
    every = [(number, text) for group in zip(*rows, strict=True) for number, text in group]
    folder = demand("DAVIS 2017", davis / "JPEGImages/480p" / video, _DAVIS)
    expressions = {
        str(i): {"exp": text, "obj_id": number} for i, (number, text) in enumerate(every)
    }
    return {
        "expressions": expressions,
        "frames": sorted(path.stem for path in folder.glob("*.jpg")),
    }
