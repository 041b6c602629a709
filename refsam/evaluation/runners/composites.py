"""Benchmark of clips of cut-outs with exact masks: distinguishing objects of one kind, and finding a covered one again.

Every clip is drawn from its number alone and the `val` photographs of a folder: three objects of one class with "the dog on the
left", "on the right", "the largest dog" and "the second dog from the left", and one object that is covered for ten frames.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refsam.data.dataset import DataError
from refsam.data.photographs.expressions import PhotoGrammar
from refsam.data.photographs.folder import UNSURE, open_folder
from refsam.data.photographs.layers import PhotoClip
from refsam.data.photographs.scenes import SceneDrawer
from refsam.metrics import region_similarity
from refsam.model import RefSAM
from refsam.session import VideoSession

KINDS = {
    "left": "the {noun} on the left",
    "right": "the {noun} on the right",
    "largest": "the largest {noun}",
    "second": "the second {noun} from the left",
}
COVERED = "covered"
_SIZE = (216, 384)
_SEED = 5_000_000
_ALIKE, _FRAMES, _COVERED_FRAMES = 3, 8, 24
_TRIES = 400
_LEAST = 4  # val photographs that a class needs, so that three of a kind are rarely the same one


@dataclass(frozen=True)
class CompositeClip:
    """T frames (T, H, W, 3) uint8 RGB, an expression, what it means and which pixels do not count, (T, H, W) bool each."""

    frames: NDArray[np.uint8]
    text: str
    mask: NDArray[np.bool_]
    ignore: NDArray[np.bool_]


@dataclass(frozen=True)
class CompositeScore:
    """J over the frames that show the object; of covered objects, over those after it was covered.

    `false_area` is the share of the frame marked, mean over the frames that hide it (None where none does).
    """

    kind: str
    clip: int
    text: str
    region: float
    false_area: float | None


def val_drawer(root: str | Path) -> SceneDrawer:
    """The generator of the benchmark's clips from the folder's `val` photographs; raises DataError."""
    return SceneDrawer(open_folder(root, "val"), composites=1.0, balance=0.5, least=_LEAST)


def composite_clip(drawer: SceneDrawer, kind: str, index: int) -> CompositeClip:
    """Clip `index` of one of `KINDS` or of covered objects; raises DataError where the photographs allow none."""
    place = [*KINDS, COVERED].index(kind)
    for attempt in range(_TRIES):
        random = np.random.default_rng([_SEED + index, place, attempt])
        clip = _covered(drawer, random) if kind == COVERED else _alike(drawer, random, kind)
        if clip is not None:
            return clip
    raise DataError(f"{drawer.folder.root}: no clip of the kind {kind} in {_TRIES} draws")


def _covered(drawer: SceneDrawer, random: np.random.Generator) -> CompositeClip | None:
    clip = drawer.covered(random, np.arange(_COVERED_FRAMES, dtype=float), _SIZE)
    grammar = PhotoGrammar(random, drawer.folder, clip)
    seen = grammar.counts[:, 1]
    if min(seen[0], seen[-1]) < 0.01 * clip.owner[0].size:
        return None
    colour = grammar.colour_of(1)
    noun = f"{colour} {clip.things[0].name}" if colour else clip.things[0].name
    return _clip(clip, f"the {noun}", 1)


def _alike(drawer: SceneDrawer, random: np.random.Generator, kind: str) -> CompositeClip | None:
    clip = drawer.alike(random, np.arange(0, 2 * _FRAMES, 2, dtype=float), _SIZE, _ALIKE)
    if clip is None:
        return None
    grammar = PhotoGrammar(random, drawer.folder, clip)
    numbers = list(range(1, _ALIKE + 1))
    if not grammar.are_in_view(numbers):
        return None
    if kind == "largest":
        found = [n for n in numbers if grammar.extreme(n, numbers) == "large"]
    else:
        side, rank = ("right", 0) if kind == "right" else ("left", int(kind == "second"))
        found = [n for n in numbers if grammar.rank(n, numbers, side) == rank]
    if not found:
        return None
    return _clip(clip, KINDS[kind].format(noun=clip.things[0].name), found[0])


def _clip(clip: PhotoClip, text: str, number: int) -> CompositeClip:
    return CompositeClip(clip.frames, text, clip.owner == number, clip.owner == UNSURE)


def evaluate_composites(
    model: RefSAM, root: str | Path, clips: int = 40, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Score the model on `clips` clips of each kind: means by kind, every expression's score, and a hash of the clips."""
    drawer = val_drawer(root)
    scores: list[CompositeScore] = []
    digest = hashlib.sha256()
    for kind in (*KINDS, COVERED):
        for index in range(clips):
            clip = composite_clip(drawer, kind, index)
            digest.update(f"{clip.text} {clip.mask.sum((1, 2)).tolist()}\n".encode())
            scores.append(_score(model, kind, index, clip))
            advance()
    return {
        "clips": clips,
        "drawn": digest.hexdigest(),
        "summary": summarise(scores),
        "sentences": [asdict(score) for score in scores],
    }


def summarise(scores: list[CompositeScore]) -> dict[str, Any]:
    """J by kind and over the four kinds that distinguish objects, and the marked area while an object is covered."""
    by_kind = {
        kind: fmean(s.region for s in scores if s.kind == kind)
        for kind in dict.fromkeys(s.kind for s in scores)
    }
    apart = [s.region for s in scores if s.kind in KINDS]
    hidden = [s.false_area for s in scores if s.false_area is not None]
    return {
        "J": by_kind,
        "told apart": fmean(apart) if apart else None,
        "false_area while covered": fmean(hidden) if hidden else None,
    }


def _score(model: RefSAM, kind: str, index: int, clip: CompositeClip) -> CompositeScore:
    session = VideoSession(model, [clip.text])
    predicted = np.stack([np.asarray(session.step(frame).masks)[0] for frame in clip.frames])
    shown = np.asarray(clip.mask.any((1, 2)))
    judged = shown
    if kind == COVERED:
        judged = shown & (np.arange(len(shown)) > np.flatnonzero(~shown).max())
    regions = region_similarity(predicted[judged], clip.mask[judged], clip.ignore[judged])
    marked = (predicted & ~clip.ignore)[~shown]
    false_area = float(marked.mean()) if marked.size else None
    return CompositeScore(kind, index, clip.text, fmean(regions.tolist()), false_area)
