"""Reading frames, drawing masks onto them and writing results."""

from refsam.video.frames import Frame, FrameDecodeError, FrameSource, ReadOptions
from refsam.video.images import read_image
from refsam.video.overlay import draw_overlay
from refsam.video.prefetch import prefetch
from refsam.video.reader import open_source
from refsam.video.writer import ResultWriter

__all__ = [
    "Frame",
    "FrameDecodeError",
    "FrameSource",
    "ReadOptions",
    "ResultWriter",
    "draw_overlay",
    "open_source",
    "prefetch",
    "read_image",
]
