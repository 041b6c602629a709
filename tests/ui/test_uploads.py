"""Visitors may send certain files only, which cannot be used to read anything outside the folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refsam.errors import UserError
from refsam.images import IMAGE_SUFFIXES
from refsam.ui.uploads import Limits, open_upload, read_expressions
from refsam.video import open_source
from tests.video.clips import write_video
from tests.video.heif import write_tiled_heif

LIMITS = Limits()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The only folder that may be read."""
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip"])
def test_takes_videos_whatever_they_are_called(root: Path, name: str) -> None:
    write_video(root / "clip.mp4", frames=3).rename(root / name)
    with open_upload(root / name, root, LIMITS) as source:
        assert len(list(source)) == 3


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_takes_the_images_that_the_command_line_takes(root: Path, suffix: str) -> None:
    """Also under another image's name, as phones' photographs arrive."""
    path, image = root / f"picture{suffix}", np.zeros((64, 128, 3), np.uint8)
    if suffix in (".heic", ".heif", ".hif"):
        write_tiled_heif(path, image)
    else:
        Image.fromarray(image).save(path)
    for name in (path.name, "renamed.jpg"):
        path = path.rename(root / name)
        with open_upload(path, root, LIMITS) as source:
            assert [frame.image.shape for frame in source] == [(64, 128, 3)]


@pytest.mark.parametrize("missing", ["HEIF", "AVIF"])
def test_images_are_taken_where_pillow_lacks_a_format(
    root: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (30, 20)).save(root / "picture.png")
    monkeypatch.delitem(Image.OPEN, missing)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != missing])
    with open_upload(root / "picture.png", root, LIMITS) as source:
        assert len(list(source)) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.mp4", "these are words\n" * 40),
        ("empty.mp4", ""),
        ("list.mp4", "ffconcat version 1.0\nfile {secret}\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n"),
        ("broken.png", "no image"),
        (
            "script.png",
            "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n%%EOF\n",
        ),
        ("drawing.mp4", "<svg xmlns='http://www.w3.org/2000/svg'><image href='{secret}'/></svg>"),
    ],
)
def test_refuses_other_files_and_names_them_without_their_folders(
    root: Path, name: str, content: str
) -> None:
    secret = write_video(root.parent / "secret.mp4", frames=2)
    (root / name).write_text(content.format(secret=secret))
    with pytest.raises(UserError, match=name) as caught:
        open_upload(root / name, root, LIMITS)
    assert str(root) not in str(caught.value)


def test_refuses_lists_of_clips_because_of_their_format(root: Path) -> None:
    """Such a file, whatever it is called, makes FFmpeg read others: without the check it would be taken."""
    write_video(root / "part.ts", frames=12)
    (root / "list.mp4").write_text("ffconcat version 1.0\nfile part.ts\n")
    with open_source(root / "list.mp4") as source:
        assert len(list(source)) == 12
    with pytest.raises(UserError, match="is not a video"):
        open_upload(root / "list.mp4", root, LIMITS)


@pytest.mark.parametrize("through", ["directly", "by a link", "by its parent", "as a folder"])
def test_reads_nothing_outside_the_folder(root: Path, through: str) -> None:
    outside = write_video(root.parent / "outside.mp4", frames=2)
    path = {
        "directly": outside,
        "by a link": root / "link.mp4",
        "by its parent": root / ".." / "outside.mp4",
        "as a folder": root,
    }[through]
    if through == "by a link":
        path.symlink_to(outside)
    with pytest.raises(UserError, match="was not uploaded here"):
        open_upload(path, root, LIMITS)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(megabytes=0), "MB, more than 0"),
        (Limits(frames=5), "about 12 frames, more than 5"),
        (Limits(pixels=1000), "frames of 64 x 48"),
    ],
)
def test_refuses_what_is_too_large_or_too_long(root: Path, limits: Limits, message: str) -> None:
    path = write_video(root / "clip.mp4", frames=12)
    with pytest.raises(UserError, match=f"clip.mp4 has .*{message}"):
        open_upload(path, root, limits)


def test_refuses_images_that_are_too_large(root: Path) -> None:
    Image.fromarray(np.zeros((20, 60), np.uint8)).save(root / "large.png")
    with pytest.raises(UserError, match=r"large\.png has frames of 60 x 20"):
        open_upload(root / "large.png", root, Limits(pixels=1000))


def test_reads_one_expression_per_line() -> None:
    text = "\n the red cup \n\nthe dog\n"
    assert read_expressions(text, LIMITS) == ["the red cup", "the dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n ", "Say what to segment"),
        ("a\n" * 9, "9 expressions: at most 8"),
        ("a" * 501, "501 characters: at most 500"),
    ],
)
def test_refuses_expressions(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_expressions(text, LIMITS)


def test_every_frame_is_measured_not_the_header_alone(root: Path) -> None:
    """H.264 may grow in mid-stream."""
    parts = [
        write_video(root / "part.h264", frames=2, size=size).read_bytes()
        for size in ((48, 64), (240, 320))
    ]
    (root / "clip.h264").write_bytes(b"".join(parts))
    with open_upload(root / "clip.h264", root, Limits(pixels=9000)) as source:
        good = []
        with pytest.raises(UserError):
            good.extend(source)
        assert all(frame.image.shape == (48, 64, 3) for frame in good)
    with open_upload(root / "clip.h264", root, LIMITS) as source:
        assert [frame.image.shape[0] for frame in source][-1] == 240
