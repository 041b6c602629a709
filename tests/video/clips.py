"""Small videos with a known picture, written by FFmpeg."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def picture(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Left half red, right half blue, a white bar in the row block `index`; (H, W, 3) uint8."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2, 0] = 250
    image[:, width // 2 :, 2] = 250
    top = 8 * index % height
    image[top : top + 8] = 255
    return image


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 12,
    size: tuple[int, int] = (48, 64),
    rate: int = 25,
    **more: Any,
) -> Path:
    """Write `frames` known pictures; `more` is as for `encode_video`."""
    return encode_video(path, (picture(i, *size) for i in range(frames)), codec, rate=rate, **more)


def encode_video(
    path: Path,
    images: Iterable[np.ndarray],
    codec: str = "libx264",
    *,
    rate: int = 30,
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    preset: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write images (H, W, 3) uint8 RGB.

    `times` are milliseconds, `rotation` degrees counter-clockwise, `aspect` a pixel's width / height.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.pix_fmt = pixel_format
        stream.codec_context.thread_count = 1  # the same bytes however busy the machine is
        if codec == "libx264":  # its assembly reads memory that nobody wrote: bytes would differ
            stream.options = {"x264-params": "no-asm=1"}
        if preset is not None:
            stream.options |= {"preset": preset}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for index, image in enumerate(images):
            if index == 0:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
