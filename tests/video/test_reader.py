"""Every kind of source gives the frames that a viewer would show, or one line that says what is wrong."""

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refsam.errors import UserError
from refsam.video import Frame, FrameDecodeError, open_source, prefetch, read_image
from tests.video.clips import picture, write_video


def read(path: Path) -> list[Frame]:
    with open_source(path) as source:
        return list(source)


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "tolerance"),
    [
        ("clip.mp4", "libx264", "yuv420p", 6),
        ("clip.mov", "libx264", "yuv444p", 4),
        ("clip.webm", "libvpx-vp9", "yuv420p", 6),
        ("clip.mkv", "ffv1", "bgr0", 0),
        ("clip.gif", "gif", "rgb8", 30),
    ],
)
def test_video_formats(
    tmp_path: Path, name: str, codec: str, pixel_format: str, tolerance: float
) -> None:
    path = write_video(tmp_path / name, codec, pixel_format=pixel_format)
    frames = read(path)
    assert [frame.index for frame in frames] == list(range(12))
    assert np.allclose([frame.time for frame in frames], np.arange(12) / 25)
    for frame in frames:
        assert frame.image.dtype == np.uint8
        assert mean_difference(frame.image, picture(frame.index)) <= tolerance


def test_announced_rate_and_length(tmp_path: Path) -> None:
    with open_source(write_video(tmp_path / "clip.mp4", rate=30)) as source:
        assert source.fps == 30
        assert source.expected_frames == 12


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
def test_variable_frame_rate_keeps_every_time(tmp_path: Path, name: str) -> None:
    codec = "libx264" if name.endswith("mp4") else "libvpx-vp9"
    times = [0, 40, 141, 180, 500, 1777]
    frames = read(write_video(tmp_path / name, codec, frames=6, times=times))
    assert [round(1000 * frame.time) for frame in frames] == times


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, 3), (180, 2)])
def test_rotation_metadata(tmp_path: Path, degrees: int, turns: int) -> None:
    frames = read(write_video(tmp_path / "clip.mp4", rotation=degrees))
    expected = np.rot90(picture(5), turns)
    assert frames[5].image.shape == expected.shape
    assert mean_difference(frames[5].image, expected) < 6
    assert frames[5].image.flags.c_contiguous


@pytest.mark.parametrize("size", [(47, 65), (2, 2), (1, 3)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_video(tmp_path / "clip.mkv", "ffv1", size=size, pixel_format="bgr0", frames=3)
    assert [frame.image.tolist() for frame in read(path)] == [
        picture(index, *size).tolist() for index in range(3)
    ]


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "libx264"), ("clip.gif", "gif")])
def test_video_of_one_frame(tmp_path: Path, name: str, codec: str) -> None:
    pixel_format = "rgb8" if codec == "gif" else "yuv420p"
    path = write_video(tmp_path / name, codec, frames=1, pixel_format=pixel_format)
    assert [frame.time for frame in read(path)] == [0.0]


@pytest.mark.parametrize("pixel_format", ["gray", "gray16le", "yuv420p10le"])
def test_grey_and_deep_video(tmp_path: Path, pixel_format: str) -> None:
    path = write_video(tmp_path / "clip.mkv", "ffv1", pixel_format=pixel_format, frames=2)
    image = read(path)[1].image
    assert image.shape == (48, 64, 3)
    assert image[12, 5].min() > 250  # the white bar


def test_transparent_gif_lies_on_white(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (16, 16)) for _ in range(2)]
    for index, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (4 * index, 0, 4 * index + 4, 16))
    path = tmp_path / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, disposal=2)
    images = [frame.image for frame in read(path)]
    assert images[0][8, 2].tolist() == [255, 0, 0]
    assert images[1][8, 6].tolist() == [255, 0, 0]
    assert images[1][8, 12].tolist() == [255, 255, 255]


def test_folder_is_in_natural_order_and_skips_other_files(tmp_path: Path) -> None:
    names = ["frame10.png", "frame2.PNG", "frame1.png", "a.bmp", "Übung 3.webp"]
    for value, name in enumerate(names):
        Image.new("L", (4, 3), 40 * value).save(tmp_path / name, lossless=True)
    (tmp_path / "._frame1.png").write_bytes(b"resource fork")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub.png").mkdir()
    frames = read(tmp_path)
    assert [int(frame.image[0, 0, 0]) // 40 for frame in frames] == [3, 2, 1, 0, 4]
    assert np.allclose([frame.time for frame in frames], np.arange(5) / 24)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 200, (200, 200, 200)),
        ("1", 1, (255, 255, 255)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 255, 51), (204, 224, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 0x8012, (0x80, 0x80, 0x80)),
    ],
)
def test_image_modes(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]
) -> None:
    path = tmp_path / "image.png"
    Image.new(mode, (5, 3), colour).save(path)
    (frame,) = read(path)
    assert frame.image.shape == (3, 5, 3)
    assert (frame.image == expected).all()


def test_palette_image_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "image.png", transparency=1)
    pixels = read_image(tmp_path / "image.png")
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [255, 0, 0]


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(picture(0))
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise to view
    image.save(tmp_path / "image.png", exif=exif)
    assert (read_image(tmp_path / "image.png") == np.rot90(picture(0), -1)).all()


# Errors


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def test_missing_source() -> None:
    with pytest.raises(UserError, match=r"^nowhere\.mp4 does not exist: give a video"):
        open_source("nowhere.mp4")


def test_missing_camera() -> None:
    with pytest.raises(UserError, match=r"^camera .*cannot be read"):
        open_source("camera:97")


@pytest.mark.parametrize("name", ["clip.mp4", "image.png", "noextension"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="is empty"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["text.mp4", "text.txt", "text"])
def test_file_that_is_no_video(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("not a video, just words\n" * 400)
    with pytest.raises(UserError, match=r"give a .*video.*, an image or a folder of images$"):
        open_source(tmp_path / name)


def test_sound_without_pictures(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="holds no video"):
        open_source(tmp_path / "sound.mp4")


def test_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("words")
    with pytest.raises(UserError, match=r"image\.png cannot be read as an image"):
        read(tmp_path / "image.png")


def test_floating_point_image(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "image.tif")
    with pytest.raises(UserError, match="floating-point pixels"):
        read(tmp_path / "image.tif")


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(UserError, match="holds no images: give a folder"):
        open_source(tmp_path)


def test_mp4_cut_off_before_its_index(tmp_path: Path) -> None:
    path = cut(write_video(tmp_path / "clip.mp4", frames=30), 0.6)
    with pytest.raises(
        UserError, match=r"cannot be read as a video .*: give a complete video file"
    ):
        open_source(path)


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("clip.mp4", "libx264", "yuv420p"),
        ("clip.webm", "libvpx-vp9", "yuv420p"),
        ("clip.mkv", "libx264", "yuv420p"),
        ("clip.gif", "gif", "rgb8"),
    ],
)
def test_video_cut_off_in_the_middle(
    tmp_path: Path, name: str, codec: str, pixel_format: str
) -> None:
    options = {"movflags": "faststart"} if name.endswith("mp4") else None
    path = write_video(
        tmp_path / name, codec, pixel_format=pixel_format, frames=60, options=options
    )
    cut(path, 0.8)
    good = []
    with open_source(path) as source, pytest.raises(FrameDecodeError) as raised:
        good.extend(source)
    assert 20 < len(good) < 60
    assert f"frame {len(good)} of {path}" in str(raised.value)


def test_damaged_frame_is_named_after_the_good_ones(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", frames=60)
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) * 2 // 3, 7):
        data[place] ^= 255
    path.write_bytes(data)
    good = []
    with open_source(path) as source, pytest.raises(FrameDecodeError) as raised:
        good.extend(source)
    assert 10 < len(good) < 45
    assert f"frame {len(good)} of {path}" in str(raised.value)
    assert all(mean_difference(frame.image, picture(frame.index)) < 6 for frame in good)


def test_damaged_image_in_a_folder_is_named(tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(picture(index)).save(tmp_path / f"{index}.jpg")
    cut(tmp_path / "1.jpg", 0.5)
    frames = iter(open_source(tmp_path))
    assert next(frames).index == 0
    with pytest.raises(FrameDecodeError, match=r"^frame 1: .*1\.jpg cannot be read as an image"):
        next(frames)


# Reading ahead


def test_prefetch_keeps_order_and_stays_bounded() -> None:
    produced = []

    def numbers():
        for number in range(100):
            produced.append(number)
            yield number

    ahead = prefetch(numbers(), depth=3)
    seen = []
    for number in ahead:
        seen.append(number)
        assert len(produced) <= len(seen) + 3 + 1
    assert seen == list(range(100))


def test_prefetch_raises_after_the_items_before_the_error() -> None:
    def failing():
        yield 1
        yield 2
        raise FrameDecodeError("frame 2")

    seen = []
    with pytest.raises(FrameDecodeError, match="frame 2"):
        seen.extend(prefetch(failing()))
    assert seen == [1, 2]


def test_prefetch_ends_its_thread_when_closed() -> None:
    threads: list[threading.Thread] = []

    def numbers():
        threads.append(threading.current_thread())
        yield from range(1000)

    ahead = prefetch(numbers(), depth=2, patience=300)
    next(ahead)
    ahead.close()
    assert not threads[0].is_alive()
