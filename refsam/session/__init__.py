"""Videos frame by frame: one (`VideoSession`, `segment_video`) or many (`step_together`, `segment_videos`)."""

from refsam.session.graphs import FrameGraphs
from refsam.session.preparation import FramePreparer, PreparedFrame, prepare_all
from refsam.session.share import Share
from refsam.session.video_session import FrameResult, VideoSession, segment_video, step_together
from refsam.session.videos import VideoOutcome, segment_videos

__all__ = [
    "FrameGraphs",
    "FramePreparer",
    "FrameResult",
    "PreparedFrame",
    "Share",
    "VideoOutcome",
    "VideoSession",
    "prepare_all",
    "segment_video",
    "segment_videos",
    "step_together",
]
