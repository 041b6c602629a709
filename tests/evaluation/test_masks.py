"""Scoring PNGs on the disk: equal to the DAVIS evaluation, complete about what is wrong, the same for any processes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import linear_sum_assignment

from refsam.errors import UserError
from refsam.evaluation.scoring.masks import evaluate_masks
from refsam.evaluation.scoring.problems import MaskProblemsError
from refsam.metrics import contour_accuracy, region_similarity

CHECKOUT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("REFSAM_GOLDEN_DIR", CHECKOUT.parent / "shared" / "golden"))
PALETTE = [value for number in range(256) for value in (number, 255 - number, 40 * number % 256)]
SIZE = (40, 60)


def write_maps(folder, maps, names=None, mode="P"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(names or [f"{i:05d}" for i in range(len(maps))], maps, strict=True):
        image = Image.fromarray(np.asarray(values, dtype=np.uint8), mode="L")
        if mode == "P":
            image.putpalette(PALETTE)
        image.save(folder / f"{name}.png")


def square(top, left, value=1, size=SIZE, side=12):
    values = np.zeros(size, dtype=np.uint8)
    values[top : top + side, left : left + side] = value
    return values


@pytest.fixture
def folders(tmp_path):
    """Predictions and truth of two videos: "bear" with two objects, swapped and a bit off, and "cat" with one."""
    bear = [square(3, 3 + t, 1) + square(20, 30 + t, 2) for t in range(4)]
    swapped = [square(4, 3 + t, 2) + square(20, 31 + t, 1) for t in range(4)]
    write_maps(tmp_path / "gt" / "bear", bear)
    write_maps(tmp_path / "pred" / "bear", swapped)
    cat = [square(10, 10 + t) for t in range(3)]
    write_maps(tmp_path / "gt" / "cat", cat)
    write_maps(tmp_path / "pred" / "cat", cat)
    return tmp_path / "pred", tmp_path / "gt"


def scores_of(first, second):
    return region_similarity(first, second), contour_accuracy(first, second)


def golden(name):
    path = GOLDEN / f"davis_masks_{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there; REFSAM_GOLDEN_DIR names the folder of golden files")
    return np.load(path)


@pytest.mark.parametrize("name", ["bmx-trees", "dogs-jump"])
def test_unsupervised_matches_davis_on_real_masks(name, tmp_path):
    data = golden(name)
    known = np.isin(data["pred"], data["pred_ids"])
    write_maps(tmp_path / "pred" / name, np.where(known, data["pred"], 0))
    write_maps(tmp_path / "gt" / name, data["gt"])
    result = evaluate_masks(tmp_path / "pred", tmp_path / "gt", "davis-unsupervised")
    rows, columns = linear_sum_assignment(-(data["J"].mean(2) + data["F"].mean(2)) / 2)
    for score, row, column in zip(result.scores, rows, columns, strict=True):
        np.testing.assert_allclose(score.region, data["J"][row, column], rtol=0, atol=1e-9)
        np.testing.assert_allclose(score.contour, data["F"][row, column], rtol=0, atol=1e-9)
        assert score.matched == data["pred_ids"][column]
    both = (data["J"] + data["F"])[rows, columns] / 2
    assert result.overall["J&F-Mean"] == pytest.approx(both.mean(), abs=1e-12)


def test_semi_supervised_matches_davis_on_real_masks(tmp_path):
    data = golden("dogs-jump")
    objects = len(data["gt_ids"])
    write_maps(tmp_path / "pred" / "dogs", np.where(data["pred"] <= objects, data["pred"], 0))
    write_maps(tmp_path / "gt" / "dogs", data["gt"])
    result = evaluate_masks(tmp_path / "pred", tmp_path / "gt", "davis-semi-supervised")
    assert len(result.scores) == objects
    for i, score in enumerate(result.scores):
        np.testing.assert_allclose(score.region, data["J"][i, i, 1:-1], rtol=0, atol=1e-9)
        np.testing.assert_allclose(score.contour, data["F"][i, i, 1:-1], rtol=0, atol=1e-9)
        assert score.frames == tuple(f"{t:05d}" for t in range(1, 11))


def test_unsupervised_forgives_swapped_numbers_and_semi_supervised_does_not(folders):
    matched = evaluate_masks(*folders, "davis-unsupervised")
    assert [score.matched for score in matched.scores] == [2, 1, 1]
    expected = scores_of(square(4, 3), square(3, 3))
    assert matched.scores[0].region == pytest.approx([expected[0]] * 4)
    assert matched.scores[0].contour == pytest.approx([expected[1]] * 4)
    strict = evaluate_masks(*folders, "davis-semi-supervised")
    assert strict.videos["bear"]["J-Mean"] == 0
    assert strict.videos["cat"]["J-Mean"] == 1


def test_overall_gives_every_object_the_same_weight(folders):
    result = evaluate_masks(*folders)
    means = [score.measures["J-Mean"] for score in result.scores]
    assert result.overall["J-Mean"] == pytest.approx(np.mean(means), abs=1e-15)
    assert result.videos["bear"]["J-Mean"] == pytest.approx(np.mean(means[:2]), abs=1e-15)


def test_void_counts_in_the_unsupervised_protocol_only(tmp_path):
    truth = square(10, 10) + square(10, 22, 255)
    prediction = (truth > 0).astype(np.uint8)
    write_maps(tmp_path / "gt" / "v", [truth] * 3)
    write_maps(tmp_path / "pred" / "v", [prediction] * 3)
    folders = tmp_path / "pred", tmp_path / "gt"
    assert evaluate_masks(*folders, "davis-unsupervised").overall["J-Mean"] == 1
    assert evaluate_masks(*folders, "davis-semi-supervised").overall["J-Mean"] == 0.5


def test_objects_are_those_of_the_first_frame(tmp_path):
    write_maps(tmp_path / "gt" / "v", [square(3, 3, 1), square(3, 3, 1) + square(20, 20, 2)])
    write_maps(tmp_path / "pred" / "v", [square(3, 3, 1)] * 2)
    result = evaluate_masks(tmp_path / "pred", tmp_path / "gt")
    assert [score.name for score in result.scores] == ["1"]
    assert result.overall["J&F-Mean"] == 1


def test_an_object_that_is_never_predicted_scores_as_empty_and_is_named(tmp_path):
    write_maps(tmp_path / "gt" / "v", [square(3, 3, 1) + square(20, 20, 2), square(3, 3, 1)])
    write_maps(tmp_path / "pred" / "v", [square(3, 3, 1)] * 2)
    result = evaluate_masks(tmp_path / "pred", tmp_path / "gt")
    assert result.scores[1].region.tolist() == [0, 1]  # absent in the second frame, rightly
    assert result.scores[1].matched is None
    assert "objects with no prediction in any frame: v 2" in result.table()


def test_gaps_between_object_numbers_change_nothing(folders):
    before = evaluate_masks(*folders)
    for path in (folders[0] / "bear").iterdir():
        values = np.array(Image.open(path))
        write_maps(path.parent, [np.where(values == 1, 17, values)], [path.stem])
    after = evaluate_masks(*folders)
    assert after.overall == before.overall
    assert [score.matched for score in after.scores] == [2, 17, 1]


def expression_folders(root, clips):
    """Folders of {(video, expression): (predictions, truths)}."""
    for (video, expression), (predicted, true) in clips.items():
        write_maps(root / "pred" / video / expression, predicted, mode="L")
        write_maps(root / "gt" / video / expression, true, mode="L")
    return root / "pred", root / "gt"


def test_expressions_are_averaged_over_frames_then_over_expressions(tmp_path):
    empty, here, there = np.zeros(SIZE), square(3, 3, 255), square(3, 9, 255)
    clips = {
        ("a", "0"): ([here] * 2, [here] * 2),
        ("a", "1"): ([there] * 2, [here] * 2),
        ("b", "0"): ([empty, here, empty, empty], [empty, here, empty, here]),
    }
    result = evaluate_masks(*expression_folders(tmp_path, clips), "per-expression")
    half = region_similarity(there > 0, here > 0)
    assert [score.measures["J-Mean"] for score in result.scores] == pytest.approx([1, half, 0.75])
    assert result.overall["J-Mean"] == pytest.approx((1 + half + 0.75) / 3)


def test_a_binary_mask_may_have_any_value(tmp_path):
    clips = {("a", "0"): ([square(3, 3, 1)], [square(3, 3, 255)])}
    assert (
        evaluate_masks(*expression_folders(tmp_path, clips), "per-expression").overall["F-Mean"]
        == 1
    )


def write_expressions(path, video, frames, **keys):
    expressions = {
        name: {"exp": "the thing", **entry} for name, entry in keys["expressions"].items()
    }
    path.write_text(json.dumps({"videos": {video: {"frames": frames, "expressions": expressions}}}))
    return path


def test_expressions_of_maps_follow_their_objects_and_listed_frames(tmp_path):
    names = ["00000", "00005", "00010"]
    maps = [square(3, 3, 1) + square(20, 20, 2)] * 3
    write_maps(tmp_path / "gt" / "v", maps, names)
    write_maps(tmp_path / "pred" / "v" / "0", [square(20, 20)] * 2, names[:2])
    write_maps(tmp_path / "pred" / "v" / "1", [square(3, 3)] * 2, names[:2])
    expressions = write_expressions(
        tmp_path / "meta.json",
        "v",
        names[:2],
        expressions={"0": {"obj_id": "2"}, "1": {"obj_id": [1, 2]}},
    )
    folders = tmp_path / "pred", tmp_path / "gt"
    result = evaluate_masks(*folders, "per-expression", expressions=expressions)
    assert [score.measures["J-Mean"] for score in result.scores] == [1, 0.5]
    assert result.scores[0].frames == ("00000", "00005")


def test_listed_videos_without_truth_are_named(tmp_path):
    write_maps(tmp_path / "gt" / "v", [square(3, 3)])
    write_maps(tmp_path / "pred" / "v" / "0", [square(3, 3)])
    meta = write_expressions(
        tmp_path / "m.json", "v", ["00000"], expressions={"0": {"obj_id": "1"}}
    )
    listed = json.loads(meta.read_text())
    listed["videos"]["test-video"] = {"frames": [], "expressions": {"0": {"exp": "x"}}}
    meta.write_text(json.dumps(listed))
    result = evaluate_masks(tmp_path / "pred", tmp_path / "gt", "per-expression", expressions=meta)
    assert result.notes == ("not scored, as the truth lacks these listed videos: test-video",)


def test_run_length_codes_of_mevis_are_united(tmp_path):
    coco = pytest.importorskip("pycocotools.mask", reason="needs refsam[eval]")

    def code(mask):
        entry = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": entry["size"], "counts": entry["counts"].decode()}

    first, second = square(3, 3), square(8, 8)
    codes = {"7": [code(first), None], "9": [code(second), code(second)]}
    (tmp_path / "mask_dict.json").write_text(json.dumps(codes))
    meta = write_expressions(
        tmp_path / "meta_expressions.json",
        "v",
        ["00000", "00001"],
        expressions={
            "0": {"obj_id": [0, 1], "anno_id": [7, 9]},
            "1": {"obj_id": [0], "anno_id": [7]},
        },
    )
    write_maps(tmp_path / "pred" / "v" / "0", [first | second, second])
    write_maps(tmp_path / "pred" / "v" / "1", [first, second])
    result = evaluate_masks(
        tmp_path / "pred", tmp_path / "mask_dict.json", "per-expression", expressions=meta
    )
    assert [score.region.tolist() for score in result.scores] == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("truth", "prediction", "expected"),
    [
        pytest.param(np.ones(SIZE), np.ones(SIZE), (1, 1), id="full"),
        pytest.param(np.ones(SIZE), np.zeros(SIZE), (0, 1), id="full, nothing predicted"),
        pytest.param(square(5, 5, side=1), square(5, 5, side=1), (1, 1), id="single pixel"),
    ],
)
def test_corner_cases_of_one_frame(truth, prediction, expected, tmp_path):
    write_maps(tmp_path / "gt" / "v", [truth])
    write_maps(tmp_path / "pred" / "v", [prediction])
    measures = evaluate_masks(tmp_path / "pred", tmp_path / "gt").overall
    assert (measures["J-Mean"], measures["F-Mean"]) == expected
    assert measures["J-Decay"] == 0


def test_a_frame_of_void_only_is_perfect(tmp_path):
    write_maps(tmp_path / "gt" / "v", [square(5, 5), np.full(SIZE, 255)])
    write_maps(tmp_path / "pred" / "v", [square(5, 5), square(9, 9)])
    assert evaluate_masks(tmp_path / "pred", tmp_path / "gt").overall["J&F-Mean"] == 1


def test_decay_of_more_than_256_frames(tmp_path):
    truth = [square(2, 2, size=(16, 16), side=8)] * 300
    right_at_first = [truth[t] * (t < 100) for t in range(300)]
    write_maps(tmp_path / "gt" / "v", truth)
    write_maps(tmp_path / "pred" / "v", right_at_first)
    measures = evaluate_masks(tmp_path / "pred", tmp_path / "gt").overall
    assert measures["J-Mean"] == measures["J-Recall"] == pytest.approx(1 / 3)
    assert measures["J-Decay"] == 1


def problems_of(folders, protocol="davis-unsupervised", **options):
    with pytest.raises(MaskProblemsError) as caught:
        evaluate_masks(*folders, protocol, **options)
    return str(caught.value)


def test_everything_wrong_is_listed_at_once(folders):
    pred, gt = folders
    write_maps(gt / "dog", [square(1, 1)] * 3)
    write_maps(pred / "stray", [square(1, 1)])
    (pred / "bear" / "00001.png").unlink()
    write_maps(pred / "bear", [square(1, 1)] * 2, ["00007", "00009"])
    cut_off = (pred / "bear" / "00000.png").read_bytes()[:-30]
    (pred / "bear" / "00000.png").write_bytes(cut_off)
    write_maps(pred / "bear", [square(1, 1, size=(40, 61))], ["00002"])
    Image.new("RGB", SIZE[::-1]).save(pred / "cat" / "00000.png")
    write_maps(pred / "cat", [square(1, 1, 255), square(1, 1, 21)], ["00001", "00002"])
    message = problems_of(folders)
    for line in (
        "1 video missing: dog",
        "1 video not in the truth: stray",
        "bear: 1 frame missing: 00001",
        "bear: 2 frames not in the truth: 00007, 00009",
        "bear: 1 unreadable PNG: 00000",
        "bear: 1 mask of another size than the truth: 00002 (61x40, not 60x40)",
        "cat: 1 PNG neither palette nor grey: 00000 (RGB)",
        "cat: 2 masks with too high an object number: 00001 (255, at most 20: a mask saved as 0/255?), "
        "00002 (21, at most 20)",
        "--missing zero",
    ):
        assert line in message


def test_missing_zero_scores_what_cannot_be_used_as_empty_and_says_so(folders):
    pred, gt = folders
    write_maps(gt / "dog", [square(1, 1)] * 3)
    (pred / "cat" / "00000.png").unlink()
    (pred / "cat" / "00001.png").write_bytes(b"no PNG")
    result = evaluate_masks(pred, gt, missing="zero")
    by_video = {score.video: score.region.tolist() for score in result.scores}
    assert by_video["cat"] == [0, 0, 1]
    assert by_video["dog"] == [0, 0, 0]
    table = result.table()
    assert "3 problems; what could not be used was scored as empty:" in table
    assert "cat: 1 frame missing: 00000" in table


def test_problems_of_expressions_are_listed(tmp_path):
    here = square(3, 3, 255)
    folders = expression_folders(tmp_path, {("a", str(i)): ([here], [here]) for i in range(3)})
    write_maps(folders[0] / "a" / "0", [here + square(20, 20, 100)])
    (folders[0] / "a" / "1").rename(folders[0] / "a" / "9")
    message = problems_of(folders, "per-expression")
    for line in (
        "a: 1 expression missing: 1",
        "a: 1 expression not in the truth: 9",
        "a/0: 1 mask not binary: 00000 (3 values)",
    ):
        assert line in message
    result = evaluate_masks(*folders, "per-expression", missing="zero")
    assert [score.measures["J-Mean"] for score in result.scores] == [0, 0, 1]


def test_too_many_objects_stop_the_semi_supervised_protocol(folders):
    write_maps(folders[0] / "cat", [square(1, 1, 2)], ["00001"])
    assert "cat: 1 mask with too high an object number: 00001 (2, at most 1)" in problems_of(
        folders, "davis-semi-supervised"
    )


def test_a_faulty_truth_stops_even_with_missing_zero(folders):
    (folders[1] / "cat" / "00002.png").write_bytes(b"")
    write_maps(folders[1] / "bear", [np.zeros(SIZE)], ["00000"])
    message = problems_of(folders, missing="zero")
    assert "cat: 1 fault in the truth: 00002: unreadable" in message
    assert "bear: 1 fault in the truth: no object in the first frame" in message
    assert "must be put right" in message


def test_unscored_frames_may_be_absent(folders):
    for name in ("00000", "00003"):
        (folders[0] / "bear" / f"{name}.png").unlink()
    (folders[0] / "cat" / "00000.png").unlink()
    assert not evaluate_masks(*folders, "davis-semi-supervised").problems


def test_other_files_are_ignored_aloud(folders):
    (folders[0] / "global_results.csv").write_text("J,F")
    (folders[0] / "cat" / "overlay.mp4").write_bytes(b"")
    notes = evaluate_masks(*folders).notes
    assert any("global_results.csv" in note for note in notes)
    assert any("overlay.mp4" in note for note in notes)


def test_videos_restrict_the_scoring(folders):
    result = evaluate_masks(*folders, videos=["cat"])
    assert {score.video for score in result.scores} == {"cat"}
    with pytest.raises(UserError, match="videos: not in the truth: cow"):
        evaluate_masks(*folders, videos=["cat", "cow"])


def test_any_number_of_processes_gives_the_same_result(folders):
    alone, shared = (evaluate_masks(*folders, processes=number) for number in (1, 2))
    assert shared.as_dict() == alone.as_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "coco"}, "protocol: got 'coco', want one of davis-unsupervised"),
        ({"missing": "skip"}, "missing: got 'skip', want error or zero"),
        ({"processes": 0}, "processes: got 0, want at least 1"),
        ({"protocol": "per-expression"}, r"truth: no masks in .*bear, want <video>/<expression>/"),
        ({"expressions": Path("m.json")}, "expressions: davis-unsupervised has none"),
        (
            {"expressions": Path("m.json"), "protocol": "per-expression"},
            "m.json: not readable as JSON",
        ),
    ],
)
def test_impossible_requests_say_what_would_be_right(folders, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_masks(*folders, **options)


def test_missing_folders_are_named(folders, tmp_path):
    with pytest.raises(UserError, match=r"prediction: no folder .*nowhere"):
        evaluate_masks(tmp_path / "nowhere", folders[1])
    with pytest.raises(UserError, match=r"truth: no folder .*nowhere"):
        evaluate_masks(folders[0], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"truth: no videos in .*empty, want <video>/<frame>.png"):
        evaluate_masks(folders[0], tmp_path / "empty")


def test_two_frames_are_too_few_for_the_semi_supervised_protocol(tmp_path):
    write_maps(tmp_path / "gt" / "v", [square(1, 1)] * 2)
    write_maps(tmp_path / "pred" / "v", [square(1, 1)] * 2)
    with pytest.raises(UserError, match="v has 2 frames, davis-semi-supervised needs at least 3"):
        evaluate_masks(tmp_path / "pred", tmp_path / "gt", "davis-semi-supervised")
