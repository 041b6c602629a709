"""Reading frames, drawing masks onto them and writing results."""

from refsam.video.overlay import draw_overlay
from refsam.video.reader import (
    Frame,
    FrameDecodeError,
    FrameSource,
    open_source,
    prefetch,
    read_image,
)
from refsam.video.writer import ResultWriter

__all__ = [
    "Frame",
    "FrameDecodeError",
    "FrameSource",
    "ResultWriter",
    "draw_overlay",
    "open_source",
    "prefetch",
    "read_image",
]
