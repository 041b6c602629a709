"""Scores of masks: J and F of video segmentation, and the IoUs of referring image segmentation."""

from refsam.metrics.referring_image import (
    CONVENTIONS,
    Convention,
    ReferringImageScores,
    intersection_union,
    referring_image_scores,
)
from refsam.metrics.region_contour import (
    SequenceScores,
    Statistics,
    boundary,
    boundary_radius,
    contour_accuracy,
    is_native,
    label_scores,
    region_similarity,
    sequence_scores,
    statistics,
)

__all__ = [
    "CONVENTIONS",
    "Convention",
    "ReferringImageScores",
    "SequenceScores",
    "Statistics",
    "boundary",
    "boundary_radius",
    "contour_accuracy",
    "intersection_union",
    "is_native",
    "label_scores",
    "referring_image_scores",
    "region_similarity",
    "sequence_scores",
    "statistics",
]
