"""Frames are what a viewer shows: colours, pixel shape, transparency, the right stream, every picture of an animation."""

import socket
import struct
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, features

from refsam.errors import UserError
from refsam.images import read_image
from refsam.video import Frame, FrameDecodeError, ReadOptions, open_source, prefetch
from tests.video.clips import picture, write_video
from tests.video.heif import write_tiled_heif

MATRICES = {601: (0.299, 0.114, 6), 709: (0.2126, 0.0722, 1), 2020: (0.2627, 0.0593, 9)}


def read(source: object, **options: object) -> list[Frame]:
    with open_source(str(source), ReadOptions(**options)) as opened:  # type: ignore[arg-type]
        return list(opened)


def notes_of(source: Path) -> list[str]:
    with open_source(source) as opened:
        list(opened)
        return opened.notes


def encode(path: Path, frame: av.VideoFrame, count: int = 2, **settings: object) -> Path:
    """The same frame some times in H.264 without loss; `settings` of the encoder's context."""
    options = {"qp": "0", **settings.pop("options", {})}  # type: ignore[dict-item]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, frame.format.name
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for _ in range(count):
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def plain(y: int, u: int, v: int) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(
        np.stack([np.full((32, 32), value, np.uint8) for value in (y, u, v)]), format="yuv444p"
    )


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("standard", [601, 709, 2020])
def test_colours(tmp_path: Path, standard: int, full_range: bool) -> None:
    kr, kb, code = MATRICES[standard]
    for yuv in [(120, 90, 200), (150, 160, 100), (60, 128, 128)]:
        if full_range:
            luma, blue, red = yuv[0] / 255, (yuv[1] - 128) / 255, (yuv[2] - 128) / 255
        else:
            luma, blue, red = (yuv[0] - 16) / 219, (yuv[1] - 128) / 224, (yuv[2] - 128) / 224
        r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
        expected = np.clip([r, (luma - kr * r - kb * b) / (1 - kr - kb), b], 0, 1) * 255
        frame = plain(*yuv)
        path = encode(
            tmp_path / "clip.mkv", frame, colorspace=code, color_range=2 if full_range else 1
        )
        assert np.abs(read(path)[0].image[16, 16] - expected).max() <= 3


@pytest.mark.parametrize(("curve", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_noted(tmp_path: Path, curve: int, name: str) -> None:
    path = encode(tmp_path / "clip.mkv", plain(99, 99, 99), color_trc=curve)
    (note,) = notes_of(path)
    assert f"HDR ({name})" in note and "without tone mapping" in note


def test_interlaced_is_noted(tmp_path: Path) -> None:
    options = {"x264-params": "tff=1"}
    path = encode(tmp_path / "clip.mkv", plain(99, 99, 99), options=options)
    (note,) = notes_of(path)
    assert note.startswith("interlaced")


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        (Fraction(2), (32, 64)),
        (Fraction(1, 2), (64, 32)),
        (Fraction(16, 15), (32, 34)),
        (Fraction(101, 100), (32, 32)),
        (Fraction(1000), (32, 32)),
    ],
)
def test_pixels_that_are_not_square(
    tmp_path: Path, ratio: Fraction, shown: tuple[int, int]
) -> None:
    path = encode(tmp_path / "clip.mp4", plain(99, 99, 99), sample_aspect_ratio=ratio)
    frame = read(path)[0]
    assert frame.image.shape[:2] == (32, 32)
    assert frame.square_image().shape[:2] == shown


def test_best_stream_is_taken(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        streams = []
        for side in (16, 48, 32):
            stream = container.add_stream("ffv1", rate=25)
            stream.height, stream.width, stream.pix_fmt = side, side, "bgr0"
            streams.append(stream)
        for index in range(2):
            for stream in streams:
                image = picture(index, stream.height, stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    assert read(tmp_path / "clip.mkv")[0].image.shape == (48, 48, 3)


def unknown_codec(path: Path, *, beside: bool) -> Path:
    """An AVI whose first stream nobody can decode."""
    with av.open(str(path), "w") as container:
        codecs = ["mpeg4", "mjpeg"] if beside else ["mpeg4"]
        streams = [container.add_stream(codec, rate=25) for codec in codecs]
        for stream in streams:
            stream.height, stream.width = 48, 64
            stream.pix_fmt = "yuvj420p" if stream.name == "mjpeg" else "yuv420p"
        for index in range(3):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"zzzz"))
    return path


def test_stream_without_a_decoder(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"alone\.avi is encoded in a way that FFmpeg cannot decode"
    ):
        open_source(unknown_codec(tmp_path / "alone.avi", beside=False))
    assert len(read(unknown_codec(tmp_path / "beside.avi", beside=True))) == 3


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_transparent_webm_lies_on_white(tmp_path: Path, codec: str) -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, :16] = (255, 0, 0, 255)
    with av.open(str(tmp_path / "clip.webm"), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"auto-alt-ref": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuva420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode(None))
    frames = read(tmp_path / "clip.webm")
    assert len(frames) == 2
    assert frames[1].image[16, 28].min() > 240
    assert frames[1].image[16, 4, 0] > 200 and frames[1].image[16, 4, 2] < 60


@pytest.mark.parametrize("rate", [12, 30, 50])
def test_raw_video_has_one_rate(tmp_path: Path, rate: int) -> None:
    with open_source(write_video(tmp_path / "clip.h264", frames=4, rate=rate)) as source:
        times = [frame.time for frame in source]
        assert source.fps == rate
    assert np.allclose(times, np.arange(4) / rate)


# Animations


@pytest.mark.parametrize("suffix", ["webp", "png", "avif"])
def test_animated_images(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    images = [Image.fromarray(picture(index)) for index in range(3)]
    options = {} if suffix == "png" else {"quality": 95}
    images[0].save(
        tmp_path / f"a.{suffix}",
        save_all=True,
        append_images=images[1:],
        duration=[40, 80, 40],
        **options,
    )
    frames = read(tmp_path / f"a.{suffix}")
    assert [round(1000 * frame.time) for frame in frames] == [0, 40, 120]
    for index, frame in enumerate(frames):
        assert np.abs(frame.image.astype(int) - picture(index)).mean() < 8


def test_pages_of_a_tiff_but_not_its_small_copies(tmp_path: Path) -> None:
    images = [Image.fromarray(picture(index)) for index in range(3)]
    images[0].save(tmp_path / "pages.tif", save_all=True, append_images=images[1:])
    assert [frame.image.tolist() for frame in read(tmp_path / "pages.tif")] == [
        picture(index).tolist() for index in range(3)
    ]
    small = images[0].resize((16, 12))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    images[0].save(tmp_path / "pyramid.tif", save_all=True, append_images=[small])
    assert len(read(tmp_path / "pyramid.tif")) == 1


def test_animation_among_images_is_refused(tmp_path: Path) -> None:
    images = [Image.fromarray(picture(index)) for index in range(2)]
    images[0].save(tmp_path / "0.png")
    images[0].save(tmp_path / "1.webp", save_all=True, append_images=images[1:], lossless=True)
    with pytest.raises(FrameDecodeError, match=r"1\.webp holds 2 pictures: give it alone"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content", [b"BM" + b"\xff" * 90, b"\x89PNG\r\n\x1a\n" + b"\xff" * 90, b"II*\0" + b"\xff" * 60]
)
def test_images_that_pillow_chokes_on(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(UserError, match=r"image\.png cannot be read as an image"):
        read(tmp_path / "image.png")


# Limits, edits


def with_edit(path: Path, begin: int, frames: int) -> Path:
    """A clip of 40 frames of which its edit list shows some."""
    write_video(path, frames=40, options={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    place = content.index(b"elst")
    time_scale = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    first = struct.unpack_from(">i", content, place + 16)[0]
    struct.pack_into(">I", content, place + 12, frames * 40)  # milliseconds
    struct.pack_into(">i", content, place + 16, first + begin * time_scale // 25)
    path.write_bytes(content)
    return path


def test_edit_lists_are_counted_as_they_are_shown(tmp_path: Path) -> None:
    with open_source(with_edit(tmp_path / "clip.mp4", 12, 8)) as source:
        expected = source.expected_frames
        frames = list(source)
    assert len(frames) == expected == 8
    assert np.abs(frames[0].image.astype(int) - picture(12)).mean() < 8


def growing(path: Path) -> Path:
    """H.264 whose frames grow in mid-stream, which its container does not say."""
    parts = []
    for size in ((48, 64), (480, 640)):
        part = write_video(path.with_name("part.h264"), frames=3, size=size)
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def test_every_frame_is_measured(tmp_path: Path) -> None:
    path = growing(tmp_path / "clip.h264")
    assert [frame.image.shape[0] for frame in read(path)][-1] == 480
    good = []
    with pytest.raises(UserError), open_source(path, ReadOptions(max_pixels=10_000)) as source:
        good.extend(source)
    assert good and {frame.image.shape for frame in good} == {(48, 64, 3)}


# Silence


@pytest.mark.parametrize("protocol", ["http", "rtsp", "rtmp", "tcp"])
def test_server_that_never_answers(protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{protocol}://127.0.0.1:{server.getsockname()[1]}/clip.mp4"
        with pytest.raises(UserError, match=r"sent nothing for 0\.5 s: --timeout"):
            open_source(address, ReadOptions(timeout=0.5))


def test_closing_does_not_wait_for_who_cannot_be_woken() -> None:
    """Else this would not end."""
    silent = threading.Event()

    def camera():  # type: ignore[no-untyped-def]
        yield 1
        silent.wait()

    ahead = prefetch(camera())
    assert next(ahead) == 1
    ahead.close()
    silent.set()


@pytest.mark.parametrize("name", ["photo.heic", "photo.HIF", "photo.jpg"])
def test_photographs_in_tiles_are_whole(tmp_path: Path, name: str) -> None:
    """AirDrop and mail name them .jpg as well."""
    image = np.zeros((128, 192, 3), np.uint8)
    image[:64, :64], image[64:, 64:128], image[64:, 128:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    path = write_tiled_heif(tmp_path / name, image)
    for shown in (read(path)[0].image, np.asarray(read_image(path)[0])):
        assert shown.shape == image.shape
        assert np.abs(shown.astype(int) - image).max() <= 12
