"""The datasets' files as they really come: other image sizes, degenerate outlines, marks and encodings, gaps in the lists."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refsam.data import DataError, open_dataset
from refsam.data.clips import ClipSampler
from refsam.data.ref_davis17 import prepare
from refsam.data.run_lengths import Code, decode, open_arrays
from refsam.errors import UserError
from tests.data import fixtures
from tests.data.fixtures import SIZE, numbers_at
from tests.data.test_check import states


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("factor", [0.5, 2, 1.25])
@pytest.mark.parametrize("number", [1, 2])  # polygons, run lengths
def test_refcoco_masks_are_scaled_with_their_image(
    tmp_path: Path, factor: float, number: int
) -> None:
    root = fixtures.write_refcoco(tmp_path)
    before = open_dataset("refcoco", root, "val")
    (video,) = before.videos
    expression = before.expressions(video.name)[2 * (number - 1)]
    small = before.mask(expression, video.name)
    path = before.frame_file(video.name, video.name)
    size = (round(SIZE[1] * factor), round(SIZE[0] * factor))
    Image.open(path).resize(size).save(path)
    mask = open_dataset("refcoco", root, "val").mask(expression, video.name)
    assert mask.shape == size[::-1]
    back = np.asarray(Image.fromarray(mask).resize(SIZE[::-1], Image.Resampling.NEAREST))
    # At half the size, an edge between two pixels moves to one of them.
    assert (back & small).sum() / (back | small).sum() > (0.9 if factor > 1 else 0.8)
    assert states("refcoco", root)["unc val", "frames"][0] == "ok"


def test_refcoco_images_of_another_aspect_are_refused_and_found(tmp_path: Path) -> None:
    root = fixtures.write_refcoco(tmp_path)
    dataset = open_dataset("refcoco", root, "val")
    (video,) = dataset.videos
    path = dataset.frame_file(video.name, video.name)
    Image.open(path).resize(SIZE).save(path)  # height and width change places
    with pytest.raises(DataError, match=r"image of 64x48, its file has 48x64"):
        dataset.mask(dataset.expressions(video.name)[0], video.name)
    state, detail = states("refcoco", root)["unc val", "frames"]
    assert state == "broken" and "48x64 where instances.json says 64x48" in detail


@pytest.mark.parametrize(
    "outline",
    [
        [],
        [[]],
        [[1, 1]],
        [[1, 1, 9, 9]],
        [[1, 1, 9, 1, 9, 9, 5]],
        [["a"] * 6],
        None,
        "abc",
        {},
        [7],
    ],
)
def test_refcoco_objects_without_an_outline_are_left_out_and_told(
    tmp_path: Path, outline: Any
) -> None:
    root = fixtures.write_refcoco(tmp_path)

    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = outline  # object 101 of image 1

    change_json(root / "refcoco/instances.json", spoil)
    dataset = open_dataset("refcoco", root, "train")
    assert (
        "object 101" in dataset.faults[0] and len(dataset.expressions(dataset.videos[0].name)) == 2
    )
    ClipSampler(dataset, 1).clip(0, 0, 0)
    state, detail = states("refcoco", root)["unc train", "masks"]
    assert state == "broken" and "object 101" in detail


def test_refcoco_small_parts_beside_a_good_outline(tmp_path: Path) -> None:
    root = fixtures.write_refcoco(tmp_path)
    before = open_dataset("refcoco", root, "train")
    expression = before.expressions(before.videos[0].name)[0]
    want = before.mask(expression, expression.video)
    for extra in ([3, 3], [3, 3, 20, 30], []):
        change_json(
            root / "refcoco/instances.json",
            lambda content, extra=extra: content["annotations"][0]["segmentation"].insert(0, extra),
        )
        dataset = open_dataset("refcoco", root, "train")
        assert np.array_equal(dataset.mask(expression, expression.video), want)


@pytest.mark.parametrize(
    "code",
    [
        {
            "size": [48, 64],
            "counts": [5, 3, 2],
        },  # too short: pycocotools fills up with what lies in memory
        {"size": [48, 60], "counts": "PZ20"},
        {"size": [48, 64], "counts": ""},
    ],
)
def test_run_lengths_that_do_not_fill_their_size(tmp_path: Path, code: dict[str, Any]) -> None:
    root = fixtures.write_mevis(tmp_path)
    change_json(root / "train/mask_dict.json", lambda content: content.update({"11": [code] * 4}))
    dataset = open_dataset("mevis", root, "train")
    expression = dataset.expressions("9f21474aca92")[0]
    if code["counts"] == "":  # nothing is seen
        assert not dataset.mask(expression, "00000").any()
        return
    with pytest.raises(DataError, match=r"9f21474aca92/00000, object 11: its run lengths cover"):
        dataset.mask(expression, "00000")


@pytest.mark.parametrize("seed", range(8))
def test_totals_of_run_lengths_are_those_of_their_masks(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 90, 2)
    mask = random.random((height, width)) < random.choice([0.0, 0.01, 0.5, 1.0])
    code = fixtures.run_lengths(mask)
    counts = code["counts"].encode()
    assert np.array_equal(decode(Code(counts, (height, width))), mask)
    with pytest.raises(DataError, match="cover"):
        decode(Code(counts, (height + 1, width)))


def test_mevis_codes_of_another_size(tmp_path: Path) -> None:
    root = fixtures.write_mevis(tmp_path)
    path = root / "train/mask_dict.json"
    half = fixtures.run_lengths(numbers_at(0, 3)[::2, ::2] == 1)
    change_json(path, lambda content: content.update({"11": [half] * 4}))
    dataset = open_dataset("mevis", root, "train")
    expression = dataset.expressions("9f21474aca92")[0]
    mask, want = dataset.mask(expression, "00000"), numbers_at(0, 3) == 1
    assert (mask & want).sum() / (mask | want).sum() > 0.8
    wide = fixtures.run_lengths(np.ones((20, 60), bool))
    change_json(path, lambda content: content.update({"11": [wide] * 4}))
    with pytest.raises(DataError, match="image of 60x20"):
        open_dataset("mevis", root, "train").mask(expression, "00000")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    path = root / "meta_expressions/train/meta_expressions.json"
    before = open_dataset("ref-youtube-vos", root, "train").expressions_by_video
    path.write_bytes(path.read_text().encode(encoding))
    assert open_dataset("ref-youtube-vos", root, "train").expressions_by_video == before


@pytest.mark.parametrize(
    ("name", "write", "listing", "key"),
    [
        ("ref-youtube-vos", fixtures.write_ref_youtube_vos, "meta_expressions/train", "obj_id"),
        ("mevis", fixtures.write_mevis, "train", "anno_id"),
    ],
)
def test_expressions_that_do_not_tell_their_objects_are_all_named(
    tmp_path: Path, name: str, write, listing: str, key: str
) -> None:
    root = write(tmp_path)

    def forget(content: dict[str, Any]) -> None:
        for video in content["videos"].values():
            del video["expressions"]["1"][key]

    change_json(root / listing / "meta_expressions.json", forget)
    with pytest.raises(DataError, match=r"name no objects: \w+/1") as error:
        open_dataset(name, root, "train")
    assert str(error.value).count("/1") >= 1


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("blackswan 1 the black swan", "the black swan"),
        ('blackswan 1 "the black swan"', "the black swan"),
        ('blackswan 1 "the "black" swan', 'the "black" swan'),
        ("blackswan 1 “the black swan”", "the black swan"),
        ("blackswan 1 swan\x85 black", "swan black"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_davis_sentences_keep_their_letters(
    tmp_path: Path, line: str, wanted: str, encoding: str
) -> None:
    original = fixtures.write_davis17(tmp_path / "in")
    texts = original / "davis_text_annotations"
    for path in texts.iterdir():
        rest = 'blackswan 2 "b"\ngoldfish 1 "c"\nclasic-car 1 "d"\n'
        try:
            path.write_bytes(f"{line}\r\n{rest}".encode(encoding))
        except UnicodeEncodeError:
            pytest.skip("these quotes are not in Latin-1")
    prepare(original / "DAVIS", texts, tmp_path / "out")
    expression = open_dataset("ref-davis17", tmp_path / "out", "valid").expressions("blackswan")[0]
    assert expression.text == wanted


def test_a_table_is_made_by_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("{}")
    built = []

    def build() -> dict[str, Any]:
        built.append(1)
        return {"a": np.arange(3)}

    threads = [threading.Thread(target=open_arrays, args=(path, build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_read_only_disk_uses_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data/table.json"
    path.parent.mkdir()
    path.write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda folder, mode: Path(folder) != path.parent)
    built = []
    for _ in range(2):
        arrays = open_arrays(path, lambda: built.append(1) or {"a": np.arange(3)})
        assert arrays["a"].tolist() == [0, 1, 2]
    assert len(built) == 1 and [entry.name for entry in path.parent.iterdir()] == ["table.json"]


def test_two_preparations_at_once_are_refused(tmp_path: Path) -> None:
    from refsam.runtime.files import only_writer

    original = fixtures.write_davis17(tmp_path / "in")
    with (
        only_writer(tmp_path / "out", wait=False),
        pytest.raises(UserError, match="being written by another process"),
    ):
        prepare(original / "DAVIS", original / "davis_text_annotations", tmp_path / "out")


def test_a_video_about_which_every_sentence_means_nothing_is_scored(tmp_path: Path) -> None:
    from refsam.evaluation.scoring.masks import evaluate_masks

    root = fixtures.write_mevis(tmp_path)
    listing = root / "valid_u/meta_expressions.json"

    def empty(content: dict[str, Any]) -> None:
        entry = content["videos"]["9f21474aca92"]
        nothing = {"0": {"exp": "a dog", "obj_id": [], "anno_id": []}}
        content["videos"]["aaaaaaaaaaaa"] = {"expressions": nothing, "frames": entry["frames"]}

    change_json(listing, empty)
    numbers = {"0": (1,), "1": (2, 3), "2": ()}
    for time in range(4):
        for expression, objects in numbers.items():
            mask = np.isin(numbers_at(time, 3), objects).astype(np.uint8)
            path = tmp_path / f"out/9f21474aca92/{expression}/{time:05d}.png"
            fixtures.write_image(path, mask * 255)
        marked = np.zeros(SIZE, np.uint8)
        marked[:4] = 255 * (time == 3)  # wrongly, in the last frame
        fixtures.write_image(tmp_path / f"out/aaaaaaaaaaaa/0/{time:05d}.png", marked)
    result = evaluate_masks(
        tmp_path / "out", root / "valid_u/mask_dict.json", "per-expression", expressions=listing
    )
    scores = {(score.video, score.name): score.region.mean() for score in result.scores}
    assert scores["aaaaaaaaaaaa", "0"] == 0.75 and scores["9f21474aca92", "1"] == 1.0
