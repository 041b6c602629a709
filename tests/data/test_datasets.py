"""Every dataset, from files in its exact format: what is listed, what is read, and what is said about broken files."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refsam.data import DataError, open_dataset
from refsam.data.dataset import UnreadableError
from refsam.data.ref_davis17 import prepare
from refsam.data.refcoco import read_refs
from tests.data import fixtures
from tests.data.fixtures import EXPRESSIONS, SIZE, numbers_at

WRITERS = {
    "refcoco": fixtures.write_refcoco,
    "refcoco+": fixtures.write_refcoco,
    "refcocog": fixtures.write_refcoco,
    "ref-youtube-vos": fixtures.write_ref_youtube_vos,
    "ref-davis17": fixtures.write_ref_davis17,
    "mevis": fixtures.write_mevis,
    "long-rvos": fixtures.write_long_rvos,
    "folder": fixtures.write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_frames_and_masks_of_every_dataset(name: str, tmp_path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(name, WRITERS[name](tmp_path / "d"), "train")))
    assert dataset.videos
    for video in dataset.videos:
        assert dataset.frame(video.name, video.frame_names[0]).shape == (*SIZE, 3)
        for expression in dataset.expressions(video.name):
            assert expression.video == video.name
            for frame in video.annotated:
                mask = dataset.mask(expression, frame)
                assert mask is not None and mask.shape == SIZE and mask.dtype == bool


def test_ref_youtube_vos_means_the_numbered_object(tmp_path: Path) -> None:
    dataset = open_dataset("ref-youtube-vos", fixtures.write_ref_youtube_vos(tmp_path), "train")
    video = dataset.videos[0]
    assert video.frame_names == ("00000", "00005", "00010", "00015") == video.annotated
    expressions = dataset.expressions(video.name)
    assert [e.expression_id for e in expressions] == ["0", "1", "2", "3"]
    assert [e.object_ids for e in expressions] == [(1,), (1,), (2,), (2,)]
    for time, frame in enumerate(video.frame_names):
        for expression in expressions:
            want = numbers_at(time, 2) == expression.object_ids[0]
            assert np.array_equal(dataset.mask(expression, frame), want)
    assert not dataset.mask(expressions[2], "00005").any()  # hidden there


def test_ref_youtube_vos_valid_leaves_the_test_videos_out(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    dataset = open_dataset("ref-youtube-vos", root, "valid")
    assert [video.name for video in dataset.videos] == ["0062f68aaa"]
    assert dataset.mask(dataset.expressions("0062f68aaa")[0], "00000") is None
    assert "1 of 2 listed videos" in dataset.notes[0] and "202" in dataset.notes[0]
    assert "no truth" in dataset.notes[1]
    (root / "meta_expressions/test/meta_expressions.json").unlink()  # no longer to be had
    assert open_dataset("ref-youtube-vos", root, "valid").videos == dataset.videos


def test_ref_youtube_vos_truth_of_valid(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos_truth(fixtures.write_ref_youtube_vos(tmp_path))
    dataset = open_dataset("ref-youtube-vos", root, "valid")
    assert dataset.truth == root / "valid/Annotations"
    mask = dataset.mask(dataset.expressions("0062f68aaa")[1], "00010")
    assert np.array_equal(mask, numbers_at(2, 2) == 2)


def test_ref_youtube_vos_truth_of_valid_as_binary_masks(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    folder = root / "valid/Annotations/0062f68aaa/1"
    for time in range(4):
        mask = (numbers_at(time, 2) == 2).astype(np.uint8) * 255
        fixtures.write_image(folder / f"{5 * time:05d}.png", mask)
    dataset = open_dataset("ref-youtube-vos", root, "valid")
    mask = dataset.mask(dataset.expressions("0062f68aaa")[1], "00010")
    assert np.array_equal(mask, numbers_at(2, 2) == 2)


def test_ref_davis17_numbers_expressions_by_object_and_annotator(tmp_path: Path) -> None:
    root = fixtures.write_ref_davis17(tmp_path / "ref-davis")
    original = tmp_path / "ref-davis-original"
    assert (original / "DAVIS/JPEGImages/480p/blackswan/00000.jpg").is_file()
    dataset = open_dataset("ref-davis17", root, "valid")
    assert [video.name for video in dataset.videos] == ["blackswan", "goldfish"]
    expressions = dataset.expressions("blackswan")
    assert [e.expression_id for e in expressions] == [str(i) for i in range(8)]
    assert [e.annotator for e in expressions] == [0, 1, 2, 3] * 2
    assert [e.object_ids for e in expressions] == [(1,)] * 4 + [(2,)] * 4
    assert [e.text for e in expressions[4:]] == [f"{EXPRESSIONS[2]} café {i}" for i in range(4)]
    assert open_dataset("ref-davis17", root, "train").videos[0].name == "classic-car"


def test_ref_davis17_can_be_copied(tmp_path: Path) -> None:
    original = fixtures.write_davis17(tmp_path / "in")
    counts = prepare(
        original / "DAVIS", original / "davis_text_annotations", tmp_path / "out", copy=True
    )
    assert counts == {"train": 4, "valid": 12}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(DataError, match="exists"):
        prepare(original / "DAVIS", original / "davis_text_annotations", tmp_path / "out")


def test_ref_davis17_refuses_texts_that_disagree(tmp_path: Path) -> None:
    original = fixtures.write_davis17(tmp_path / "in")
    texts = original / "davis_text_annotations"
    path = texts / "Davis17_annot2.txt"
    path.write_bytes(path.read_bytes().replace(b"blackswan 2", b"blackswan 3"))
    with pytest.raises(DataError, match="other objects for blackswan"):
        prepare(original / "DAVIS", texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_text("blackswan two words\n")
    with pytest.raises(DataError, match="line 1"):
        prepare(original / "DAVIS", texts, tmp_path / "out")


def test_mevis_unites_objects_and_knows_nothing_from_not_told(tmp_path: Path) -> None:
    root = fixtures.write_mevis(tmp_path)
    dataset = open_dataset("mevis", root, "valid_u")
    one, two, none = dataset.expressions("9f21474aca92")
    assert two.object_ids == (12, 13) and none.object_ids == ()
    for time, frame in enumerate(dataset.videos[0].frame_names):
        numbers = numbers_at(time, 3)
        assert np.array_equal(dataset.mask(one, frame), numbers == 1)
        assert np.array_equal(dataset.mask(two, frame), (numbers == 2) | (numbers == 3))
        assert not dataset.mask(none, frame).any()
    valid = open_dataset("mevis", root, "valid")
    assert valid.expressions("9f21474aca92")[0].object_ids is None
    assert valid.mask(valid.expressions("9f21474aca92")[0], "00000") is None and valid.notes


def test_mevis_masks_are_converted_once_and_again_when_they_change(tmp_path: Path) -> None:
    root = fixtures.write_mevis(tmp_path)
    first = open_dataset("mevis", root, "train")
    folders = list((root / "train").glob(".mask_dict.*"))
    assert len(folders) == 1
    path = root / "train/mask_dict.json"
    content = json.loads(path.read_text())
    content["11"] = [None] * 4
    path.write_text(json.dumps(content))
    expression = first.expressions("9f21474aca92")[0]
    assert first.mask(expression, "00000").any()
    assert not open_dataset("mevis", root, "train").mask(expression, "00000").any()


def test_mevis_masks_follow_the_list_not_the_names(tmp_path: Path) -> None:
    """The codes are in the order of `frames`, whatever the names sort to."""
    root = fixtures.write_mevis(tmp_path)
    path = root / "train/meta_expressions.json"
    content = json.loads(path.read_text())
    content["videos"]["9f21474aca92"]["frames"].reverse()
    path.write_text(json.dumps(content))
    dataset = open_dataset("mevis", root, "train")
    mask = dataset.mask(dataset.expressions("9f21474aca92")[0], "00003")
    assert np.array_equal(mask, numbers_at(0, 3) == 1)


def test_mevis_says_which_object_is_absent(tmp_path: Path) -> None:
    root = fixtures.write_mevis(tmp_path)
    path = root / "train/mask_dict.json"
    content = json.loads(path.read_text())
    del content["12"]
    content["13"].pop()  # fewer frames than the video
    path.write_text(json.dumps(content))
    dataset = open_dataset("mevis", root, "train")
    expression = dataset.expressions("9f21474aca92")[1]
    with pytest.raises(DataError, match="no object 12 in frame 0"):
        dataset.mask(expression, "00000")
    with pytest.raises(DataError, match="no object 13 in frame 3"):
        dataset.mask(replace(expression, object_ids=(13,)), "00003")


def test_refcoco_reads_python_2_pickles_and_takes_names_from_the_instances(tmp_path: Path) -> None:
    dataset = open_dataset("refcoco", fixtures.write_refcoco(tmp_path), "val")
    (video,) = dataset.videos
    assert video.name == "COCO_train2014_000000000003" and video.frame_names == (video.name,)
    expressions = dataset.expressions(video.name)
    assert [e.text for e in expressions] == [EXPRESSIONS[1], "box 1", EXPRESSIONS[2], "box 2"]
    assert np.array_equal(dataset.mask(expressions[2], video.name), numbers_at(2, 2) == 2)
    # The polygons overlap: a union, not a sum; object 2 lies on top of them in the picture only.
    top, left, bottom, right = fixtures.box_of(1, 2)
    want = np.zeros(SIZE, bool)
    want[top:bottom, left:right] = True
    assert np.array_equal(dataset.mask(expressions[0], video.name), want)


@pytest.mark.parametrize(("split", "image"), [("testA", 4), ("val", 3)])
def test_refcoco_splits(split: str, image: int, tmp_path: Path) -> None:
    dataset = open_dataset("refcoco", fixtures.write_refcoco(tmp_path), split)
    assert [video.name for video in dataset.videos] == [f"COCO_train2014_{image:012d}"]


def test_refcoco_train_leaves_out_images_of_any_evaluation_split(tmp_path: Path) -> None:
    root = fixtures.write_refcoco(tmp_path)
    dataset = open_dataset("refcoco", root, "train")
    assert [video.name[-1] for video in dataset.videos] == ["1"]
    assert dataset.notes == (
        "train: left out 1 images (2 objects) that are in evaluation splits of the RefCOCO family",
    )
    everything = open_dataset("refcoco", root, "train", exclude_shared=False)
    assert [video.name[-1] for video in everything.videos] == ["1", "2"]
    assert "not excluded" in everything.notes[0]
    (root / "refcoco+/refs(unc).p").unlink()
    notes = open_dataset("refcoco", root, "train").notes
    assert "left out 0 images" in notes[0] and "refcoco+ (unc) are not excluded" in notes[1]


def test_refcoco_as_json(tmp_path: Path) -> None:
    root = fixtures.write_refcoco(tmp_path)
    path = root / "refcoco/refs(unc).p"
    before = open_dataset("refcoco", root, "val")
    path.with_suffix(".json").write_text(json.dumps(read_refs(path)))
    path.unlink()
    assert open_dataset("refcoco", root, "val").expressions_by_video == before.expressions_by_video


class _Harmful:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (eval, ("open('harm', 'w')",))


def test_refcoco_never_runs_what_a_pickle_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"ref_id": _Harmful()}]))
    with pytest.raises(DataError, match=r"import builtins\.eval"):
        read_refs(path)
    assert not (tmp_path / "harm").exists()


def test_folder_reads_a_table(tmp_path: Path) -> None:
    dataset = open_dataset("folder", fixtures.write_folder(tmp_path), "train")
    kitchen, street = dataset.videos
    assert street.frame_names[:3] == street.annotated and len(street.frame_names) == 4
    one, both, none = dataset.expressions("kitchen")
    assert (both.text, both.object_ids, none.object_ids) == ("the boxes, both", (1, 2), ())
    assert np.array_equal(dataset.mask(both, kitchen.frame_names[2]), numbers_at(2, 2) > 0)
    assert np.array_equal(dataset.mask(one, kitchen.frame_names[0]), numbers_at(0, 2) == 1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("video,text\na,b\n", "want video, objects, text"),
        ("video,objects,text\nkitchen,one,a box\n", "line 2"),
        ("video,objects,text\nkitchen,1\n", "line 2"),
        ("video,objects,text\nkitchen,1,a box, red\n", "quoted"),
        ("video,objects,text\ncellar,1,a box\n", "no frames"),
    ],
)
def test_folder_says_what_is_wrong_with_the_table(table: str, message: str, tmp_path: Path) -> None:
    root = fixtures.write_folder(tmp_path)
    (root / "train/expressions.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_dataset("folder", root, "train")


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    path = root / "train/JPEGImages/0062f687f1/00000.jpg"
    Image.open(path).convert("L").save(path)
    assert open_dataset("ref-youtube-vos", root, "train").frame("0062f687f1", "00000").shape == (
        *SIZE,
        3,
    )


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("coco", "train", "want one of refcoco"),
        ("mevis", "val", "want one of train, valid_u"),
        ("ref-youtube-vos", "val", "want one of train, valid, test"),
        ("ref-youtube-vos", "train", "youtube-vos.org"),
        ("ref-davis17", "valid", "prepare-davis17"),
        ("refcoco", "train", "web.archive.org"),
        ("refcoco", "dev", r"refcoco \(unc\): got split 'dev'"),
        ("mevis", "train", "henghuiding"),
        ("folder", "train", "docs/data.md"),
    ],
)
def test_wrong_names_and_empty_roots(name: str, split: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(name, tmp_path, split)


def test_wrong_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        open_dataset("mevis", tmp_path / "nowhere", "train")


@pytest.mark.parametrize("content", ["{", "[]", '{"videos": {"a": {"frames": ["00000"]}}}'])
def test_broken_lists(content: str, tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    (root / "meta_expressions/train/meta_expressions.json").write_text(content)
    with pytest.raises(DataError, match=r"meta_expressions\.json"):
        open_dataset("ref-youtube-vos", root, "train")


def test_files_that_cannot_be_decoded(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    dataset = open_dataset("ref-youtube-vos", root, "train")
    expression = dataset.expressions("00a23ccf53")[0]
    frame = root / "train/JPEGImages/00a23ccf53/00000.jpg"
    frame.write_bytes(frame.read_bytes()[:400])
    with pytest.raises(UnreadableError, match=r"00000\.jpg"):
        dataset.frame("00a23ccf53", "00000")
    mask = root / "train/Annotations/00a23ccf53/00005.png"
    mask.write_bytes(b"no image")
    with pytest.raises(UnreadableError, match=r"00005\.png"):
        dataset.mask(expression, "00005")
    Image.new("RGB", SIZE[::-1]).save(root / "train/Annotations/00a23ccf53/00010.png")
    with pytest.raises(DataError, match="mode RGB"):
        dataset.mask(expression, "00010")
    Image.new("L", (8, 9)).save(root / "train/Annotations/00a23ccf53/00015.png")
    with pytest.raises(DataError, match=r"00a23ccf53/00015 is 8x9, its frame 64x48"):
        dataset.mask(expression, "00015")
