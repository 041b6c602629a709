"""Videos frame by frame: one (`VideoSession`, `segment_video`) or many (`step_together`, `segment_videos`)."""

from refsam.runtime.shard import Share
from refsam.session.graphs import FrameGraphs
from refsam.session.preparation import EncodedFrame, FramePreparer, PreparedFrame
from refsam.session.video_session import (
    FrameResult,
    VideoSession,
    read_ahead,
    segment_video,
    step_together,
)
from refsam.session.videos import VideoOutcome, segment_videos

__all__ = [
    "EncodedFrame",
    "FrameGraphs",
    "FramePreparer",
    "FrameResult",
    "PreparedFrame",
    "Share",
    "VideoOutcome",
    "VideoSession",
    "read_ahead",
    "segment_video",
    "segment_videos",
    "step_together",
]
