"""`refsam data check`: what is there, missing and broken."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from refsam.cli.data import app
from refsam.data import DataError
from refsam.data.check import check, recognise
from tests.data import fixtures
from tests.data.test_datasets import WRITERS


def states(name: str, root: Path, decode: bool = False) -> dict[tuple[str, str], tuple[str, str]]:
    return {
        (row.split, row.part): (row.state, row.detail) for row in check(name, root, decode=decode)
    }


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_broken_in_what_is_right(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path / "d")
    assert name in recognise(root)
    found = states(name, root, decode=True)
    train = {key: state for key, (state, _) in found.items() if key[0].endswith("train")}
    assert train and set(train.values()) == {"ok"}
    assert not [row for row in found.values() if row[0] == "broken"]


def test_counts_stand_beside_the_official_ones(tmp_path: Path) -> None:
    found = states("ref-youtube-vos", fixtures.write_ref_youtube_vos(tmp_path))
    assert found["train", "expressions"] == (
        "ok",
        "2 videos, 6 expressions (official: 3471 videos)",
    )
    assert found["train", "frames"] == ("ok", "8 frames")
    assert found["valid", "masks"][0] == "not there"
    assert found["test", "frames"][0] == "missing"


def test_missing_files_are_counted_and_named(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    for path in (root / "train/JPEGImages/0062f687f1").iterdir():
        path.unlink()
    (root / "train/Annotations/00a23ccf53/00005.png").unlink()
    found = states("ref-youtube-vos", root)
    assert found["train", "frames"] == (
        "broken",
        "8 frames; no 0062f687f1/00000; no 0062f687f1/00005; no 0062f687f1/00010 and 1 more",
    )
    assert "no mask of 00a23ccf53/00005 for objects (1,)" in found["train", "masks"][1]


def test_decoding_finds_damaged_files_other_sizes_and_absent_objects(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    frame = root / "train/JPEGImages/0062f687f1/00000.jpg"
    frame.write_bytes(frame.read_bytes()[:400])
    Image.new("L", (8, 9)).save(root / "train/Annotations/00a23ccf53/00015.png")
    listing = root / "meta_expressions/train/meta_expressions.json"
    listing.write_text(listing.read_text().replace('"obj_id": "2"', '"obj_id": "9"'))
    assert states("ref-youtube-vos", root)["train", "frames"][0] == "ok"  # the files are there
    found = states("ref-youtube-vos", root, decode=True)
    assert found["train", "frames"][0] == "broken" and "00000.jpg" in found["train", "frames"][1]
    masks = found["train", "masks"][1]
    assert "8x9" in masks and "no frame of 0062f687f1 shows object (9,)" in masks


def test_a_list_that_cannot_be_read_is_broken(tmp_path: Path) -> None:
    root = fixtures.write_mevis(tmp_path)
    (root / "train/mask_dict.json").write_text("{")
    (root / "valid_u/meta_expressions.json").write_text("{}")
    found = states("mevis", root)
    assert found["train", "masks"][0] == "broken" and found["train", "expressions"][0] == "ok"
    assert found["valid_u", "expressions"][0] == "broken"


def test_refcoco_objects_that_the_instances_lack(tmp_path: Path) -> None:
    root = fixtures.write_refcoco(tmp_path)
    (root / "refcoco/instances.json").write_text('{"images": [], "annotations": []}')
    state, detail = states("refcoco", root)["unc val", "masks"]
    assert state == "broken" and "no image 3" in detail


def test_a_folder_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--dataset"):
        recognise(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        recognise(tmp_path / "nowhere")


def test_the_command_prints_a_table_and_the_sources(tmp_path: Path) -> None:
    root = fixtures.write_ref_youtube_vos(tmp_path)
    result = CliRunner().invoke(app, ["check", str(root)])
    assert result.exit_code == 0
    assert "ref-youtube-vos  train  frames       ok" in result.stdout
    assert "skynbe/Refer-Youtube-VOS/issues/8" in result.stdout
    (root / "train/Annotations/00a23ccf53/00005.png").unlink()
    assert CliRunner().invoke(app, ["check", str(root)]).exit_code == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    result = CliRunner().invoke(app, ["check", str(empty), "--dataset", "mevis"])
    assert result.exit_code == 2 and "henghuiding/MeViS" in result.stdout


def test_the_command_prepares_ref_davis17(tmp_path: Path) -> None:
    original = fixtures.write_davis17(tmp_path / "in")
    out = tmp_path / "ref-davis"
    arguments = [original / "DAVIS", original / "davis_text_annotations", "--out", out]
    result = CliRunner().invoke(app, ["prepare-davis17", *map(str, arguments)])
    assert result.exit_code == 0 and "12 expressions in valid" in result.stdout
    assert recognise(out) == ("ref-davis17",)
