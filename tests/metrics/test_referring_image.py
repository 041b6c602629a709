"""oIoU, mIoU and P@X against values worked out by hand."""

import numpy as np
import pytest

from refsam.metrics import CONVENTIONS, intersection_union, referring_image_scores

# IoU 0.5 exactly, 0.75, 0, and empty against empty.
INTERSECTIONS = [50, 75, 0, 0]
UNIONS = [100, 100, 200, 0]


@pytest.mark.parametrize(
    ("convention", "mean", "above_half"),
    [
        ("referformer", 2.25 / 4, 2 / 4),
        ("sa2va", 2.25 / 4, 2 / 4),
        ("lavt", 1.25 / 4, 2 / 4),
    ],
)
def test_scores_match_the_convention(convention, mean, above_half):
    scores = referring_image_scores(INTERSECTIONS, UNIONS, convention)
    assert scores.overall_iou == pytest.approx(125 / 400)
    assert scores.mean_iou == pytest.approx(mean, abs=1e-7)
    assert scores.precision[0.5] == pytest.approx(above_half)
    assert list(scores.precision) == [0.5, 0.6, 0.7, 0.8, 0.9]


def test_an_iou_of_exactly_x_counts_only_where_the_convention_says_so():
    counts = [7, 9], [14, 10]
    assert referring_image_scores(*counts, "lavt").precision == {
        0.5: 1.0,
        0.6: 0.5,
        0.7: 0.5,
        0.8: 0.5,
        0.9: 0.5,
    }
    assert referring_image_scores(*counts, "sa2va").precision[0.5] == 0.5


@pytest.mark.parametrize(("convention", "score"), [("referformer", 1), ("sa2va", 1), ("lavt", 0)])
def test_only_empty_samples(convention, score):
    scores = referring_image_scores([0, 0], [0, 0], convention)
    assert scores.overall_iou == scores.mean_iou == scores.precision[0.9] == score


def test_overall_iou_weighs_large_objects_and_mean_iou_does_not():
    scores = referring_image_scores([900, 0], [1000, 10])
    assert scores.overall_iou == pytest.approx(900 / 1010)
    assert scores.mean_iou == pytest.approx(0.45, abs=1e-6)


def test_intersection_union_counts_pixels_outside_of_ignore():
    prediction, truth = np.zeros((2, 6, 8), dtype=np.uint8)
    prediction[:, :4], truth[:, 2:6] = 255, 1
    ignore = np.zeros((6, 8), dtype=bool)
    ignore[0] = True
    assert intersection_union(prediction, truth) == (12, 36)
    assert intersection_union(prediction, truth, ignore) == (10, 30)


def test_every_convention_says_its_rules():
    assert all("mIoU" in rule.rules and "P@X" in rule.rules for rule in CONVENTIONS.values())


def test_scores_reject_impossible_counts():
    with pytest.raises(ValueError, match="convention: got 'davis', want one of referformer"):
        referring_image_scores([1], [2], "davis")
    with pytest.raises(ValueError, match=r"want \(N,\) twice"):
        referring_image_scores([1, 2], [2])
    with pytest.raises(ValueError, match=r"want \(N,\) twice"):
        referring_image_scores([], [])
    with pytest.raises(ValueError, match="more than the union in sample 1"):
        referring_image_scores([1, 3], [2, 2])


def test_intersection_union_rejects_impossible_masks():
    mask = np.zeros((4, 5), dtype=bool)
    with pytest.raises(ValueError, match=r"truth: got shape \(5, 4\)"):
        intersection_union(mask, mask.T)
    with pytest.raises(ValueError, match="ignore: got dtype float64"):
        intersection_union(mask, mask, mask * 1.0)
