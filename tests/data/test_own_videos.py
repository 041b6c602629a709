"""One's own videos: what is made to work, and what is said where names, masks or the table do not fit."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from refsam.cli.data import app
from refsam.data import DataError, open_dataset
from refsam.video import open_source
from tests.data import fixtures

HEADER = "video,objects,text"


def write(root: Path, frames: int = 3) -> Path:
    """One video, two objects."""
    split = root / "train"
    names = [f"frame{index}" for index in range(frames)]
    fixtures.write_video(split / "frames/kitchen", split / "masks/kitchen", names, 2)
    (split / "expressions.csv").write_text(f"{HEADER}\nkitchen,1,the red box\nkitchen,2,a blue\n")
    return split


def check(root: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", str(root)])
    return result.exit_code, result.stdout


def test_suffixes_of_any_case_are_masks(tmp_path: Path) -> None:
    split = write(tmp_path)
    for path in list((split / "masks/kitchen").iterdir()):
        path.rename(path.with_suffix(".PNG"))
    code, output = check(tmp_path)
    assert code == 0 and "3 frames with masks" in output
    dataset = open_dataset("folder", tmp_path, "train")
    assert dataset.mask(dataset.expressions("kitchen")[0], "frame0").any()


def rename_stems(split: Path) -> None:
    for path in list((split / "masks/kitchen").iterdir()):
        path.rename(path.with_stem(f"{path.stem}_mask"))


def misname_folder(split: Path) -> None:
    (split / "masks/kitchen").rename(split / "masks/kichen")


def empty_masks(split: Path) -> None:
    for path in (split / "masks/kitchen").iterdir():
        path.unlink()


def jpeg_masks(split: Path) -> None:
    for path in list((split / "masks/kitchen").iterdir()):
        path.rename(path.with_suffix(".jpg"))


def white_masks(split: Path) -> None:
    (split / "expressions.csv").write_text(f"{HEADER}\nkitchen,1,the red box\n")
    for path in (split / "masks/kitchen").iterdir():
        Image.fromarray(np.where(np.array(Image.open(path)) == 1, 255, 0).astype("u1")).save(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (rename_stems, ["frame0_mask.png", "such as frame0.png"]),
        (misname_folder, ["kichen is of no video", "is it kitchen?"]),
        (empty_masks, ["no PNG", "nothing"]),
        (jpeg_masks, ["no PNG", ".jpg"]),
        (white_masks, ["shows object 1", "they hold 255", "save them as 0 and 1"]),
    ],
)
def test_masks_that_no_frame_can_use_are_an_error(tmp_path: Path, spoil, words) -> None:
    spoil(write(tmp_path))
    code, output = check(tmp_path)
    assert code == 2 and "broken" in output
    for text in words:
        assert text in output


def test_one_video_of_several_without_masks_is_told(tmp_path: Path) -> None:
    split = write(tmp_path)
    fixtures.write_video(split / "frames/cellar", split / "masks/celar", ["a0"], 1)
    fixtures.write_video(split / "frames/attic", None, ["a0"], 1)
    with open(split / "expressions.csv", "a") as file:
        file.write("cellar,1,the red box\n")
    code, output = check(tmp_path)
    assert code == 2 and "celar is of no video" in output and "is it cellar?" in output
    assert "attic" in open_dataset("folder", tmp_path, "train").notes[0]


def test_videos_that_are_not_listed_are_named(tmp_path: Path) -> None:
    split = write(tmp_path)
    fixtures.write_video(split / "frames/cellar", None, ["a0"], 1)
    code, output = check(tmp_path)
    assert code == 0 and "without expressions: cellar" in output


def test_frames_are_in_the_order_in_which_segment_reads_them(tmp_path: Path) -> None:
    split = write(tmp_path, frames=12)
    dataset = open_dataset("folder", tmp_path, "train")
    record = next(video for video in dataset.videos if video.name == "kitchen")
    assert record.frame_names == tuple(f"frame{index}" for index in range(12))
    frames = [frame.image for frame in open_source(split / "frames/kitchen")]
    for name, image in zip(record.frame_names, frames, strict=True):
        assert np.array_equal(dataset.frame("kitchen", name), image)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_are_turned_as_segment_turns_them(tmp_path: Path, orientation: int) -> None:
    split = write(tmp_path, frames=1)
    path = split / "frames/kitchen/frame0.jpg"
    exif = Image.Exif()
    exif[274] = orientation
    Image.open(path).save(path, exif=exif, quality=95)
    dataset = open_dataset("folder", tmp_path, "train")
    (shown,) = [frame.image for frame in open_source(path)]
    assert np.array_equal(dataset.frame("kitchen", "frame0"), shown)
    expression = dataset.expressions("kitchen")[0]
    if orientation in (6, 8):  # the mask is of the picture as it is stored
        with pytest.raises(DataError, match="is 64x48, its frame 48x64"):
            dataset.mask(expression, "frame0")
    else:
        assert dataset.mask(expression, "frame0").shape == shown.shape[:2]


TEXT = "the café's cup…"


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\nkitchen,1,{TEXT}\n".encode("cp1252"),
        f"{HEADER}\nkitchen,1,{TEXT}\n".encode("utf-8-sig"),
        f"{HEADER}\nkitchen,1,{TEXT}\n".encode("utf-16"),
        f"video\tobjects\ttext\r\nkitchen\t1\t{TEXT}\r\n".encode("utf-16"),
        f"video;objects;text\r\nkitchen;1;{TEXT}\r\n;;\r\n".encode("cp1252"),
        f"{HEADER}\r\nkitchen,1,{TEXT}\r\n,,\r\n\r\n".encode(),
    ],
)
def test_tables_as_spreadsheets_save_them(tmp_path: Path, content: bytes) -> None:
    split = write(tmp_path)
    (split / "expressions.csv").write_bytes(content)
    (expression,) = open_dataset("folder", tmp_path, "train").expressions("kitchen")
    assert (expression.text, expression.object_ids) == (TEXT, (1,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got the columns"),
        (HEADER.encode(), "no expression"),
        (HEADER.encode() + b"\nkitchen,1,\x81\n", "cannot be read as text"),
        (HEADER.encode() + b"\n../kitchen,1,a cup\n", "folder below frames"),
        (HEADER.encode() + b'\nkitchen,1,"a cup\n', "line 2: unexpected end"),
        (HEADER.encode() + b"\nKitchen,1,a cup\n", r"is it kitchen\?"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    split = write(tmp_path)
    (split / "expressions.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_dataset("folder", tmp_path, "train")


def test_files_follow_the_umask(tmp_path: Path) -> None:
    root = fixtures.write_mevis(tmp_path)
    before = os.umask(0o027)
    try:
        open_dataset("mevis", root, "train")
    finally:
        os.umask(before)
    (table,) = [path for path in (root / "train").glob(".mask_dict.*") if path.is_dir()]
    assert table.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in table.iterdir()} == {0o640}
