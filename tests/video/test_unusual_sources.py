"""Unusual but whole sources are read to their end; truncated ones are told apart; nothing is taken for something else."""

import os
import re
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from refsam.errors import UserError
from refsam.video import Frame, FrameDecodeError, ReadOptions, open_source
from tests.video.clips import picture, write_video

NOISE = np.random.default_rng(0).bytes(333)


def read(source: object, **options: object) -> list[Frame]:
    with open_source(str(source), ReadOptions(**options)) as opened:  # type: ignore[arg-type]
        return list(opened)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def remux(source: Path, target: Path, *, shift: float = 0.0, options: dict | None = None) -> Path:
    """The same packets in another container, `shift` seconds later, beside a sound that begins at once."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        sound = new.add_stream(
            "libopus" if target.suffix in (".webm", ".mkv") else "aac", rate=48000
        )
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 960), np.float32), format="flt", layout="mono"
        )
        silence.rate, silence.pts = 48000, 0
        if target.suffix == ".mp4":
            sound.codec_context.format = "fltp"
        for packet in sound.encode(silence):
            new.mux(packet)
        for packet in old.demux(video=0):
            if packet.size == 0:
                continue
            later = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + later, packet.dts + later
            packet.stream = stream
            new.mux(packet)
        for packet in sound.encode(None):
            new.mux(packet)
    return target


# Whole files


@pytest.mark.parametrize("name", ["late.mkv", "late.webm", "late.mp4"])
def test_a_video_may_begin_late(tmp_path: Path, name: str) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    clip = write_video(tmp_path / ("clip.webm" if "webm" in name else "clip.mp4"), codec, frames=8)
    path = remux(clip, tmp_path / name, shift=3.0)
    with open_source(path) as source:
        assert abs(source.expected_frames - 8) <= 1
        frames = list(source)
    assert len(frames) == 8
    assert frames[0].time == 0 and frames[7].time == pytest.approx(7 / 25, abs=0.002)


@pytest.mark.parametrize(
    "options",
    [
        {"movflags": "frag_keyframe+empty_moov"},
        {"movflags": "frag_every_frame+empty_moov+default_base_moof"},
        {"movflags": "faststart"},
    ],
)
@pytest.mark.parametrize("through", ["file", "pipe"])
def test_fragmented_and_piped_mp4(tmp_path: Path, options: dict, through: str) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=20, options=options)
    if through == "pipe":
        clip = through_fifo(tmp_path, clip.read_bytes())
    assert len(read(clip)) == 20


def through_fifo(folder: Path, content: bytes) -> Path:
    fifo = folder / "pipe"
    os.mkfifo(fifo)

    def feed() -> None:
        with open(fifo, "wb") as file:
            file.write(content)

    threading.Thread(target=feed, daemon=True).start()
    return fifo


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "tail"),
    [
        ("clip.gif", "gif", "rgb8", b"\0" * 700),
        ("clip.gif", "gif", "rgb8", b"<html>words</html>"),
        ("clip.mkv", "libx264", "yuv420p", b"\0" * 700),
        ("clip.mkv", "mjpeg", "yuvj420p", b"junk" * 9),
        ("clip.mp4", "libx264", "yuv420p", b"\0" * 700),
        ("clip.avi", "mjpeg", "yuvj420p", b"\0" * 700),
        ("clip.flv", "libx264", "yuv420p", b""),
        ("clip.ts", "libx264", "yuv420p", b""),
        *(
            (f"clip.{kind}", "libx264", "yuv420p", NOISE)
            for kind in ("mp4", "mov", "mkv", "flv", "ts")
        ),
        ("clip.webm", "libvpx-vp9", "yuv420p", NOISE),
        ("clip.ogv", "libvpx", "yuv420p", NOISE),
        ("clip.avi", "mjpeg", "yuvj420p", NOISE),
        ("clip.gif", "gif", "rgb8", NOISE),
    ],
)
def test_bytes_behind_the_end_do_not_matter(
    tmp_path: Path, name: str, codec: str, pixel_format: str, tail: bytes
) -> None:
    path = write_video(tmp_path / name, codec, pixel_format=pixel_format, frames=10)
    with path.open("ab") as file:
        file.write(tail)
    assert len(read(path)) == 10


def test_a_live_recording_without_sizes_is_whole(tmp_path: Path) -> None:
    options = {"live": "1"}
    assert len(read(write_video(tmp_path / "live.mkv", frames=10, options=options))) == 10


# Truncated files


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "options"),
    [
        ("clip.avi", "mjpeg", "yuvj420p", {}),
        ("clip.avi", "mpeg4", "yuv420p", {}),
        ("clip.mkv", "mjpeg", "yuvj420p", {}),
        ("live.mkv", "libx264", "yuv420p", {"live": "1"}),
        ("clip.mp4", "libx264", "yuv420p", {"movflags": "faststart"}),
        ("clip.mov", "mjpeg", "yuvj420p", {"movflags": "faststart"}),
        ("clip.mp4", "libx264", "yuv420p", {"movflags": "frag_every_frame+empty_moov"}),
        ("clip.flv", "libx264", "yuv420p", {}),
        ("clip.ogv", "libvpx", "yuv420p", {}),
        ("clip.gif", "gif", "rgb8", {}),
    ],
)
def test_what_is_cut_off_is_not_taken_for_whole(
    tmp_path: Path, name: str, codec: str, pixel_format: str, options: dict, share: float
) -> None:
    path = write_video(
        tmp_path / name, codec, pixel_format=pixel_format, frames=40, options=options
    )
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    good: list[Frame] = []
    with pytest.raises(UserError) as raised, open_source(path) as source:
        good.extend(source)
    assert len(good) < 40
    assert not good or isinstance(raised.value, FrameDecodeError)
    assert all(difference(f.image, picture(f.index)) < 30 for f in good)


def test_a_cut_that_takes_frames_between_others_leaves_no_frame_with_a_wrong_number(
    tmp_path: Path,
) -> None:
    path = write_video(tmp_path / "live.mkv", frames=40, options={"live": "1"})
    content = path.read_bytes()
    for end in range(len(content) // 2, len(content) - 1, 111):
        path.write_bytes(content[:end])
        good: list[Frame] = []
        with pytest.raises(FrameDecodeError), open_source(path) as source:
            good.extend(source)
        assert [f.index for f in good] == [round(25 * f.time) for f in good], end


def test_a_cut_anywhere_in_a_fragment_is_seen(tmp_path: Path) -> None:
    options = {"movflags": "frag_every_frame+empty_moov"}
    path = write_video(tmp_path / "clip.mp4", frames=4, options=options)
    content = path.read_bytes()
    boundaries = {m.start() - 4 for m in re.finditer(b"moof|mfra", content)}
    last = sorted(boundaries)[-2]
    for end in range(last - 20, last + 150):
        path.write_bytes(content[:end])
        if end not in boundaries:
            with pytest.raises(UserError):
                read(path)


def test_a_cut_in_a_pipe_is_seen_where_the_index_came_first(tmp_path: Path) -> None:
    options = {"movflags": "faststart"}
    content = write_video(tmp_path / "clip.mp4", frames=40, options=options).read_bytes()
    with pytest.raises(FrameDecodeError, match="the file ends there"):
        read(through_fifo(tmp_path, content[: len(content) * 8 // 10]))


# As a viewer shows it


def with_matrix(path: Path, **turn: object) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_rotation(**turn)
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown(image: np.ndarray, degrees: int, hflip: bool, vflip: bool) -> np.ndarray:
    """Turned counter-clockwise, then mirrored."""
    image = np.rot90(image, degrees // 90)
    image = image[:, ::-1] if hflip else image
    return image[::-1] if vflip else image


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize(("hflip", "vflip"), [(True, False), (False, True), (True, True)])
def test_turns_and_flips(tmp_path: Path, degrees: int, hflip: bool, vflip: bool) -> None:
    path = with_matrix(tmp_path / "clip.mp4", degrees=degrees, hflip=hflip, vflip=vflip)
    expected = shown(picture(1), degrees, hflip, vflip)
    assert difference(read(path)[1].image, expected) < 6
