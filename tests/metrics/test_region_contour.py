"""J and F against the golden outputs, published values and formulas of the DAVIS evaluation."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_dilation

from refsam.metrics import (
    boundary,
    boundary_radius,
    contour_accuracy,
    label_scores,
    region_similarity,
    sequence_scores,
    statistics,
)

pytestmark = pytest.mark.usefixtures("implementation")

SIZE = (480, 854)
CHECKOUT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("REFSAM_GOLDEN_DIR", CHECKOUT.parent / "shared" / "golden"))

small_masks = arrays(bool, (3, 24, 31))


def rectangle(y0, y1, x0, x1, size=SIZE):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def circle(radius):
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    return (y - 240) ** 2 + (x - 427) ** 2 <= radius**2


def contour_accuracy_by_dilation(prediction, truth, radius):
    """F as section 3 of the specification words it, with scipy's dilation by an explicit disk."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    p, g = boundary(prediction), boundary(truth)
    if not p.any() or not g.any():
        return float(p.any() == g.any())
    precision = np.sum(p & binary_dilation(g, disk)) / p.sum()
    recall = np.sum(g & binary_dilation(p, disk)) / g.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary_by_pixels(mask):
    """The boundary pixel by pixel, the missing neighbours as `seg2bmap` has them."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            down, right = min(y + 1, height - 1), min(x + 1, width - 1)
            neighbours = (mask[y, right], mask[down, x], mask[down, right])
            result[y, x] = any(n != mask[y, x] for n in neighbours)
    return result


@pytest.mark.parametrize("name", ["bmx-trees", "dogs-jump"])
def test_label_scores_match_davis_on_real_masks(name):
    path = GOLDEN / f"davis_masks_{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there; REFSAM_GOLDEN_DIR names the folder of golden files")
    golden = np.load(path)
    ids = golden["pred_ids"], golden["gt_ids"]
    region, contour = label_scores(golden["pred"], golden["gt"], *ids)
    np.testing.assert_allclose(region, golden["J"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(contour, golden["F"], rtol=0, atol=1e-9)


TRUTH = rectangle(100, 300, 200, 500)


@pytest.mark.parametrize(
    ("prediction", "truth", "void", "region", "contour"),
    [
        pytest.param(rectangle(100, 300, 205, 505), TRUTH, None, 0.967213, 1.0, id="5 px right"),
        pytest.param(rectangle(100, 300, 209, 509), TRUTH, None, 0.941748, 0.616, id="9 px right"),
        pytest.param(rectangle(88, 312, 188, 512), TRUTH, None, 0.826720, 0.0, id="12 px larger"),
        pytest.param(circle(100), circle(92), None, 0.845561, 0.787787, id="circles"),
        pytest.param(
            rectangle(400, 480, 700, 854),
            rectangle(410, 480, 690, 854),
            None,
            0.827957,
            0.072340,
            id="corner of the image",
        ),
        pytest.param(np.ones(SIZE, bool), TRUTH, None, 0.146370, 0.0, id="all ones"),
        pytest.param(
            rectangle(100, 300, 209, 509),
            TRUTH,
            rectangle(0, 480, 0, 300),
            0.956938,
            0.762670,
            id="void",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_scores_match_the_published_table(prediction, truth, void, region, contour, dtype):
    prediction, truth = (mask.astype(dtype) * dtype(255) for mask in (prediction, truth))
    assert region_similarity(prediction, truth, void) == pytest.approx(region, abs=5e-7)
    assert contour_accuracy(prediction, truth, void) == pytest.approx(contour, abs=5e-7)


@pytest.mark.parametrize(
    ("size", "radius"),
    [
        ((480, 854), 8),
        ((480, 910), 9),
        ((360, 640), 6),
        ((720, 1280), 12),
        ((1080, 1920), 18),
    ],
)
def test_boundary_radius_follows_the_diagonal(size, radius):
    assert boundary_radius(size) == radius
    assert boundary_radius(size, bound=3) == 3


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_boundary_matches_the_definition_by_pixels(mask):
    np.testing.assert_array_equal(boundary(mask), boundary_by_pixels(mask))


@settings(max_examples=60, deadline=None)
@given(small_masks, small_masks, small_masks, st.sampled_from([0, 1, 2, 5]))
def test_contour_accuracy_matches_dilation_by_a_disk(prediction, truth, void, radius):
    scores = contour_accuracy(prediction, truth, void, bound=radius)
    expected = [
        contour_accuracy_by_dilation(p & ~v, g & ~v, radius)
        for p, g, v in zip(prediction, truth, void, strict=True)
    ]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["circles", "speckle", "lines"])
def test_contour_accuracy_matches_dilation_at_full_size(case):
    random = np.random.default_rng(3)
    pair = {
        "circles": (circle(100), circle(91)),
        "speckle": tuple(random.random((2, *SIZE)) < 0.001),
        "lines": (rectangle(0, 480, 400, 401), rectangle(240, 241, 0, 854)),
    }[case]
    assert contour_accuracy(*pair) == pytest.approx(
        contour_accuracy_by_dilation(*pair, 8), abs=1e-12
    )


def test_scores_of_a_view_are_those_of_its_copy():
    masks = np.random.default_rng(0).random((2, 4, 40, 60)) < 0.3
    views = masks[:, ::2, ::-1, 1::3]
    for score in (region_similarity, contour_accuracy):
        np.testing.assert_array_equal(score(*views), score(*views.copy()))


@pytest.mark.parametrize("radius", [40, 10**12])
def test_a_disk_may_be_larger_than_the_image(radius, implementation):
    if implementation == "python" and radius > 1000:
        pytest.skip("would list every pixel of the disk")
    masks = np.random.default_rng(0).random((2, 30, 20)) < 0.1
    assert contour_accuracy(*masks, bound=radius) == 1


EMPTY, FULL, PIXEL = (
    np.zeros(SIZE, bool),
    np.ones(SIZE, bool),
    rectangle(200, 201, 300, 301),
)


@pytest.mark.parametrize(
    ("prediction", "truth", "region", "contour"),
    [
        pytest.param(EMPTY, EMPTY, 1.0, 1.0, id="both empty"),
        pytest.param(EMPTY, TRUTH, 0.0, 0.0, id="nothing predicted"),
        pytest.param(TRUTH, EMPTY, 0.0, 0.0, id="nothing there"),
        pytest.param(FULL, FULL, 1.0, 1.0, id="both full: no boundary at all"),
        pytest.param(EMPTY, FULL, 0.0, 1.0, id="empty and full: neither has a boundary"),
        pytest.param(PIXEL, PIXEL, 1.0, 1.0, id="single pixel"),
        pytest.param(PIXEL, np.roll(PIXEL, 8, 1), 0.0, 1.0, id="single pixel, 8 away"),
        pytest.param(PIXEL, np.roll(PIXEL, 10, 1), 0.0, 0.0, id="single pixel, 10 away"),
    ],
)
def test_conventions_for_empty_full_and_tiny_masks(prediction, truth, region, contour):
    assert region_similarity(prediction, truth) == region
    assert contour_accuracy(prediction, truth) == contour


def test_void_everywhere_is_a_perfect_score():
    assert region_similarity(TRUTH, EMPTY, FULL) == 1.0
    assert contour_accuracy(TRUTH, EMPTY, FULL) == 1.0


@settings(max_examples=30, deadline=None)
@given(small_masks, small_masks)
def test_scores_are_symmetric(first, second):
    for score in (region_similarity, contour_accuracy):
        np.testing.assert_allclose(score(first, second), score(second, first), rtol=0, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(small_masks, small_masks, st.permutations(range(3)))
def test_permuted_frames_give_permuted_scores(prediction, truth, order):
    for score in (region_similarity, contour_accuracy):
        expected = score(prediction, truth)[order]
        np.testing.assert_array_equal(score(prediction[order], truth[order]), expected)


@settings(max_examples=30, deadline=None)
@given(arrays(bool, (2, 12, 12)), st.integers(1, 17), st.integers(1, 17))
def test_translation_away_from_borders_changes_nothing(shapes, down, right):
    still, moved = np.zeros((2, 2, 32, 32), dtype=bool)
    still[:, 1:13, 1:13] = shapes
    moved[:, down : down + 12, right : right + 12] = shapes
    for score in (region_similarity, contour_accuracy):
        assert score(*still) == score(*moved)


def test_sequences_and_single_masks_agree():
    prediction = np.stack([TRUTH, circle(80), EMPTY])
    truth = np.stack([rectangle(90, 300, 200, 500), circle(92), EMPTY])
    scores = sequence_scores(prediction, truth)
    assert scores.region.shape == scores.contour.shape == (3,)
    singles = [region_similarity(p, g) for p, g in zip(prediction, truth, strict=True)]
    np.testing.assert_array_equal(scores.region, singles)


def test_label_scores_match_the_masks_of_each_pair():
    random = np.random.default_rng(0)
    prediction, truth = random.integers(0, 4, (2, 3, 20, 30), dtype=np.uint8)
    void = random.random((3, 20, 30)) < 0.1
    region, contour = label_scores(prediction, truth, [3, 1], [1, 2, 3], void)
    assert region.shape == contour.shape == (3, 2, 3)
    for i, true in enumerate([1, 2, 3]):
        for j, predicted in enumerate([3, 1]):
            pair = prediction == predicted, truth == true, void
            np.testing.assert_array_equal(region[i, j], region_similarity(*pair))
            np.testing.assert_array_equal(contour[i, j], contour_accuracy(*pair))
    single = label_scores(prediction[0], truth[0], [3, 1], [1, 2, 3], void[0])
    np.testing.assert_array_equal(single[0], region[..., 0])


def test_label_scores_of_other_integers_are_the_same():
    labels = np.random.default_rng(0).integers(0, 4, (2, 3, 20, 30))
    ids = [1, 2, 3, 1000], [1, 2, -1]
    for scores, expected in zip(
        label_scores(*labels, *ids), label_scores(*labels.astype(np.uint8), *ids), strict=True
    ):
        np.testing.assert_array_equal(scores, expected)


def test_label_scores_of_no_predicted_object_have_no_columns():
    region, contour = label_scores(EMPTY.astype(np.uint8), TRUTH.astype(np.uint8), [], [1])
    assert region.shape == contour.shape == (1, 0)


def test_statistics_match_the_davis_example():
    assert statistics(np.arange(9, -1, -1) / 10) == pytest.approx((0.45, 0.4, 0.7))


def test_statistics_treat_nan_as_a_miss_and_leave_it_out_of_the_means():
    result = statistics([1.0, np.nan, 0.5, 0.9])
    assert result.mean == pytest.approx(0.8)
    assert result.recall == 0.5  # 0.5 itself is no hit, nor is NaN
    assert result.decay == pytest.approx(1.0 - 0.7)


def test_statistics_of_one_frame_have_no_decay():
    assert statistics([0.7]) == pytest.approx((0.7, 1.0, 0.0))


@pytest.mark.parametrize("frames", [256, 257, 300, 1000])
def test_decay_holds_for_long_sequences(frames):
    values = np.linspace(1.0, 0.0, frames)
    assert statistics(values).decay == pytest.approx(0.75, abs=1e-2)


@pytest.mark.parametrize("score", [region_similarity, contour_accuracy])
def test_scores_reject_impossible_masks(score):
    with pytest.raises(ValueError, match=r"truth: got shape \(480, 853\), want \(480, 854\)"):
        score(TRUTH, TRUTH[:, :-1])
    with pytest.raises(ValueError, match=r"void: got shape \(3, 480, 854\), want \(480, 854\)"):
        score(TRUTH, TRUTH, np.stack([TRUTH] * 3))
    with pytest.raises(ValueError, match="prediction: got dtype float64, want bool or an integer"):
        score(TRUTH * 0.7, TRUTH)
    with pytest.raises(ValueError, match=r"prediction: got shape \(480,\), want \(H, W\) or"):
        score(TRUTH[:, 0], TRUTH)
    with pytest.raises(ValueError, match=r"prediction: got shape \(0, 5\)"):
        score(TRUTH[:0, :5], TRUTH[:0, :5])


@pytest.mark.parametrize("bound", [-0.1, 1.5])
def test_contour_accuracy_rejects_impossible_bounds(bound):
    with pytest.raises(ValueError, match=f"bound: got {bound}"):
        contour_accuracy(TRUTH, TRUTH, bound=bound)


@pytest.mark.parametrize("values", [[], [[0.1]], 0.5])
def test_statistics_reject_anything_but_one_value_per_frame(values):
    with pytest.raises(ValueError, match=r"values: got shape .*, want \(T,\)"):
        statistics(values)
