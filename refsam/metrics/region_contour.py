"""Region similarity J and contour accuracy F, equal to the DAVIS evaluation code.

Masks are `(H, W)`, or `(T, H, W)` for a sequence, of bool or integers; every pixel that is not zero
belongs to the object. A `void` mask of the same shape marks pixels that nobody knows the truth of:
both masks are cleared there first.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import repeat
from math import ceil, hypot
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

BOUND = 0.008
"""Tolerance of the contour as a fraction of the image's diagonal, as in DAVIS."""

# The compiled module (csrc/metrics) is there if the installation found a compiler.
_native: ModuleType | None
try:
    _native = import_module("refsam.metrics._native")
except ImportError:
    _native = None

Mask = NDArray[np.bool_]
Scores = NDArray[np.float64]


class Statistics(NamedTuple):
    """Mean, recall (share above 0.5) and decay (first quarter minus last) of a sequence."""

    mean: float
    recall: float
    decay: float


class SequenceScores(NamedTuple):
    """J and F of each frame, `(T,)` float64 in 0..1."""

    region: Scores
    contour: Scores


def region_similarity(
    prediction: ArrayLike, truth: ArrayLike, void: ArrayLike | None = None
) -> Scores:
    """J, the intersection over union of two masks; 1 where both are empty.

    Masks `(H, W)` give a float, `(T, H, W)` give `(T,)` float64 in 0..1. Follows `db_eval_iou` of
    davis2017.
    Raises ValueError for unequal shapes and for masks that are neither bool nor integer.
    """
    masks, is_single = check_masks(prediction, truth, void=void)
    if _native is not None:
        scores = _native.region(*map(_as_bytes, masks), _threads())
    else:
        scores = _per_frame(_region, *masks)
    return scores[0] if is_single else scores


def contour_accuracy(
    prediction: ArrayLike,
    truth: ArrayLike,
    void: ArrayLike | None = None,
    bound: float = BOUND,
) -> Scores:
    """F, the harmonic mean of precision and recall of boundary pixels, matched within a disk.

    `bound` below 1 is a part of the image's diagonal, from 1 on a number of pixels. Masks `(H, W)`
    give a float, `(T, H, W)` give `(T,)` float64 in 0..1. Follows `f_measure` of davis2017.
    Raises ValueError for unequal shapes, masks that are neither bool nor integer, and an impossible
    bound.
    """
    masks, is_single = check_masks(prediction, truth, void=void)
    radius = boundary_radius(masks[0].shape[1:], bound)
    if _native is not None:
        scores = _native.contour(*map(_as_bytes, masks), radius, _threads())
    else:
        scores = _per_frame(lambda p, g: _contour(_Contour(p, radius), _Contour(g, radius)), *masks)
    return scores[0] if is_single else scores


def sequence_scores(
    prediction: ArrayLike,
    truth: ArrayLike,
    void: ArrayLike | None = None,
    bound: float = BOUND,
) -> SequenceScores:
    """J and F of every frame of `(T, H, W)` masks, or of one `(H, W)` frame; faster than frame by frame.

    Raises ValueError as `contour_accuracy` does.
    """
    (predicted, true, unknown), _ = check_masks(prediction, truth, void=void)
    region, contour = label_scores(as_mask(predicted), as_mask(true), [1], [1], unknown, bound)
    return SequenceScores(region[0, 0], contour[0, 0])


def label_scores(
    prediction: ArrayLike,
    truth: ArrayLike,
    prediction_ids: Sequence[int],
    truth_ids: Sequence[int],
    void: ArrayLike | None = None,
    bound: float = BOUND,
) -> tuple[Scores, Scores]:
    """J and F of every object of the truth against every object of the prediction.

    `prediction` and `truth` are integer maps of object numbers, `(H, W)` or `(T, H, W)`. Returns
    two float64 arrays `(len(truth_ids), len(prediction_ids))`, for sequences `(..., T)`; each
    boundary is extracted once only.
    Raises ValueError as `contour_accuracy` does.
    """
    maps, is_single = check_masks(prediction, truth, void=void)
    radius = boundary_radius(maps[0].shape[1:], bound)
    ids = (list(prediction_ids), list(truth_ids))
    if _native is not None and all(labels.dtype in (np.uint8, np.bool_) for labels in maps[:2]):
        scores = _native.labels(*map(_as_bytes, maps), *ids, radius, _threads())
    else:
        scores = np.stack([_label_frame(*frame, ids, radius) for frame in _frames(*maps)], axis=-1)
    region, contour = scores[..., 0] if is_single else scores
    return region, contour


def statistics(values: ArrayLike) -> Statistics:
    """Mean, recall and decay of one value per frame, NaN for a frame that does not count.

    Follows `db_statistics` of davis2017: NaN is left out of mean and decay but misses in the
    recall. There the limits of the quarters are uint8, so that decay is wrong for 256 frames and
    more; here they are int64.
    Raises ValueError unless `values` is `(T,)` with T >= 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values: got shape {values.shape}, want (T,) with at least one frame")
    # With 1e-10 added numpy, which rounds halves to even, rounds them up as MATLAB does.
    limits = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(np.int64) - 1
    first, last = values[: limits[1] + 1], values[limits[3] : limits[4] + 1]
    decay = _mean_of_known(first) - _mean_of_known(last)
    return Statistics(_mean_of_known(values), float(np.mean(values > 0.5)), decay)


def boundary_radius(size: tuple[int, ...], bound: float = BOUND) -> int:
    """Pixels by which two contours may differ in an image of `size` (height, width).

    Raises ValueError for a bound that is negative, or above 1 and no whole number.
    """
    if bound < 0 or (bound >= 1 and bound != int(bound)):
        raise ValueError(f"bound: got {bound}, want a part of the diagonal or whole pixels")
    return int(bound) if bound >= 1 else ceil(bound * hypot(*size))


def boundary(mask: ArrayLike) -> Mask:
    """Boundary pixels of an `(H, W)` mask: unlike their right, lower or lower right neighbour.

    The boundary is one pixel wide and lies half a pixel to the top left; there is none along the
    image's own edges.
    Returns `(H, W)` bool. Follows `_seg2bmap` of davis2017.
    """
    inside = as_mask(np.asarray(mask))
    result = np.zeros_like(inside)
    here, right, below, diagonal = (
        inside[:-1, :-1],
        inside[:-1, 1:],
        inside[1:, :-1],
        inside[1:, 1:],
    )
    result[:-1, :-1] = (here ^ right) | (here ^ below) | (here ^ diagonal)
    result[-1, :-1] = inside[-1, :-1] ^ inside[-1, 1:]
    result[:-1, -1] = inside[:-1, -1] ^ inside[1:, -1]
    return result


def is_native() -> bool:
    """Whether the scores come from the compiled module; without it they are the same, but slower."""
    return _native is not None


class _Contour:
    """The boundary of one mask, with a margin that lets a disk reach over the image's edges."""

    def __init__(self, mask: Mask, radius: int):
        padded = np.pad(boundary(mask), radius)
        self.map = padded.ravel()
        self.pixels = np.flatnonzero(self.map)
        self.disk = _disk(radius, padded.shape[1])

    def count_near(self, other: "_Contour") -> int:
        """Number of this contour's pixels that lie within the disk of a pixel of the other one."""
        lost = self.pixels
        for offset in self.disk:  # nearest first: most pixels have found their partner after a few
            lost = lost[~other.map[lost + offset]]
            if not lost.size:
                break
        return self.pixels.size - lost.size


@lru_cache(maxsize=16)
def _disk(radius: int, stride: int) -> list[int]:
    """Flat offsets of a disk's pixels in an image with rows of `stride` pixels, nearest first."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    square = (x * x + y * y).ravel()
    order = np.argsort(square, kind="stable")
    return (y.ravel() * stride + x.ravel())[order][: np.sum(square <= radius * radius)].tolist()


def _region(prediction: Mask, truth: Mask) -> float:
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def _contour(prediction: _Contour, truth: _Contour) -> float:
    predicted, true = prediction.pixels.size, truth.pixels.size
    if not predicted or not true:
        return float(predicted == true)
    precision = prediction.count_near(truth) / predicted
    recall = truth.count_near(prediction) / true
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _label_frame(
    prediction: NDArray[np.integer],
    truth: NDArray[np.integer],
    void: Mask | None,
    ids: tuple[Sequence[int], Sequence[int]],
    radius: int,
) -> Scores:
    """J and F `(2, truth ids, prediction ids)` of one frame."""
    predicted = [_without(void, prediction == i) for i in ids[0]]
    predicted_contours = [_Contour(mask, radius) for mask in predicted]
    scores = np.empty((2, len(ids[1]), len(ids[0])))
    for row, i in enumerate(ids[1]):
        mask = _without(void, truth == i)
        contour = _Contour(mask, radius)
        scores[0, row] = [_region(other, mask) for other in predicted]
        scores[1, row] = [_contour(other, contour) for other in predicted_contours]
    return scores


def _without(void: Mask | None, mask: Mask) -> Mask:
    return mask if void is None else mask & ~void


def as_mask(values: NDArray) -> Mask:
    """Pixels that are not zero."""
    # Not "values != 0", which turns masks of bool into int64 first.
    return values.astype(np.bool_, copy=False)


def _as_bytes(masks: NDArray | None) -> NDArray | None:
    """Masks as the compiled module takes them: bool or uint8, in C order."""
    if masks is None:
        return None
    return np.ascontiguousarray(masks if masks.dtype == np.uint8 else as_mask(masks))


def _threads() -> int:
    """Threads that may share the frames of a sequence: all cores, or OMP_NUM_THREADS."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(limit)) if limit.isdecimal() else os.cpu_count() or 1


def _frames(
    prediction: NDArray, truth: NDArray, void: Mask | None
) -> Iterator[tuple[NDArray, NDArray, Mask | None]]:
    """The frames of `(T, H, W)` masks, side by side."""
    return zip(prediction, truth, repeat(None) if void is None else void, strict=False)


def _per_frame(
    score: Callable[[Mask, Mask], float], prediction: NDArray, truth: NDArray, void: Mask | None
) -> Scores:
    """`score` of every frame, cleared of void: float64 `(T,)`."""
    frames = _frames(as_mask(prediction), as_mask(truth), void)
    return np.array([score(_without(v, p), _without(v, g)) for p, g, v in frames], np.float64)


def _mean_of_known(values: Scores) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def check_masks(
    prediction: ArrayLike, truth: ArrayLike, **unknown: ArrayLike | None
) -> tuple[tuple[NDArray, NDArray, Mask | None], bool]:
    """The masks as `(T, H, W)`, and whether they were single ones `(H, W)`; `unknown` is a third one by its name, or None.

    Raises ValueError for unequal shapes, empty ones, and masks that are neither bool nor integer.
    """
    given = {"prediction": prediction, "truth": truth, **unknown}
    masks = {name: np.asarray(mask) for name, mask in given.items() if mask is not None}
    shape = masks["prediction"].shape
    if len(shape) not in (2, 3) or 0 in shape[-2:]:
        raise ValueError(f"prediction: got shape {shape}, want (H, W) or (T, H, W)")
    for name, mask in masks.items():
        if mask.shape != shape:
            raise ValueError(f"{name}: got shape {mask.shape}, want {shape}")
        if mask.dtype.kind not in "biu":
            raise ValueError(f"{name}: got dtype {mask.dtype}, want bool or an integer type")
    is_single = len(shape) == 2
    predicted, true, *others = (mask[None] if is_single else mask for mask in masks.values())
    return (predicted, true, as_mask(others[0]) if others else None), is_single
