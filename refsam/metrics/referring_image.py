"""IoU scores of referring image segmentation, by the different conventions that papers use."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refsam.metrics.region_contour import as_mask, check_masks

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class Convention(NamedTuple):
    """A convention that turns intersections and unions into scores.

    `numerator` and `denominator` are the small numbers added to I and U for the mean, `empty` the
    IoU of two empty masks, `inclusive` whether an IoU equal to X counts for P@X, `rules` the same
    in words.
    """

    numerator: float
    denominator: float
    empty: float
    inclusive: bool
    rules: str


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "referformer": Convention(
            numerator=1e-6,
            denominator=1e-6,
            empty=1.0,
            inclusive=False,
            rules="oIoU = sum I / sum U; mIoU = mean (I + 1e-6) / (U + 1e-6), empty against empty "
            "is 1; P@X counts IoU > X (MTTR, ReferFormer, SOC, SgMg, SAMWISE)",
        ),
        "sa2va": Convention(
            numerator=0.0,
            denominator=1e-5,
            empty=1.0,
            inclusive=False,
            rules="oIoU = sum I / sum U ('CIoU'); mIoU = mean I / (U + 1e-5) ('gIoU'), empty "
            "against empty is 1; Sa2VA has no P@X, here it counts IoU > X",
        ),
        "lavt": Convention(
            numerator=0.0,
            denominator=0.0,
            empty=0.0,
            inclusive=True,
            rules="oIoU = sum I / sum U; mIoU = mean I / U, empty against empty is 0; P@X counts "
            "IoU >= X (LAVT, CRIS)",
        ),
    }
)


class ReferringImageScores(NamedTuple):
    """Overall IoU, mean IoU and the share of samples above each IoU threshold; all in 0..1."""

    overall_iou: float
    mean_iou: float
    precision: dict[float, float]


def intersection_union(
    prediction: ArrayLike, truth: ArrayLike, ignore: ArrayLike | None = None
) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two `(H, W)` masks, outside of `ignore`.

    Raises ValueError for unequal shapes and for masks that are neither bool nor integer.
    """
    (predicted, true, unknown), is_single = check_masks(prediction, truth, ignore=ignore)
    if not is_single:
        raise ValueError(f"prediction: got shape {predicted.shape}, want (H, W)")
    predicted, true = as_mask(predicted), as_mask(true)
    known = True if unknown is None else ~unknown
    intersection = np.count_nonzero(predicted & true & known)
    return int(intersection), int(np.count_nonzero((predicted | true) & known))


def referring_image_scores(
    intersections: ArrayLike, unions: ArrayLike, convention: str = "referformer"
) -> ReferringImageScores:
    """oIoU, mIoU and P@0.5..0.9 of N samples from their pixel counts, `(N,)` each.

    Raises ValueError for an unknown convention, no samples, unequal numbers of them, or I > U.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: got {convention!r}, want one of {', '.join(CONVENTIONS)}")
    intersection, union = (np.asarray(x, dtype=np.float64) for x in (intersections, unions))
    if intersection.ndim != 1 or intersection.shape != union.shape or not union.size:
        raise ValueError(
            f"intersections, unions: got shapes {intersection.shape} and {union.shape}, "
            "want (N,) twice, N >= 1"
        )
    if np.any(intersection > union):
        raise ValueError(
            f"intersections: got more than the union in sample {np.argmax(intersection > union)}"
        )
    rule = CONVENTIONS[convention]
    smoothed = _ious(intersection + rule.numerator, union, rule.denominator, rule.empty)
    # The small numbers of the other programs vanish in float32, so an IoU of exactly X must stay exactly X here.
    exact = _ious(intersection, union, 0.0, rule.empty)
    above = np.greater_equal if rule.inclusive else np.greater
    return ReferringImageScores(
        overall_iou=float(intersection.sum() / union.sum()) if union.any() else rule.empty,
        mean_iou=float(smoothed.mean()),
        precision={x: float(np.mean(above(exact, x))) for x in THRESHOLDS},
    )


def _ious(
    intersection: NDArray[np.float64],
    union: NDArray[np.float64],
    extra: float,
    empty: float,
) -> NDArray[np.float64]:
    is_empty = union == 0
    return np.where(is_empty, empty, intersection / (np.where(is_empty, 1.0, union) + extra))
