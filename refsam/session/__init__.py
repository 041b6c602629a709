"""Videos frame by frame: one (`VideoSession`, `segment_video`) or many (`step_batch`, `segment_videos`)."""

from refsam.renamed import module_getattr
from refsam.runtime.shard import Shard
from refsam.session.cuda_graphs import FrameGraphs
from refsam.session.preparation import EncodedFrame, FramePreparer, PreparedFrame, encode_now
from refsam.session.streaming import prefetch_frames, segment_video
from refsam.session.track_state import TrackState
from refsam.session.video_session import FrameLogits, FrameResult, VideoSession, step_batch
from refsam.session.videos import VideoOptions, VideoOutcome, segment_videos

__all__ = [
    "EncodedFrame",
    "FrameGraphs",
    "FrameLogits",
    "FramePreparer",
    "FrameResult",
    "PreparedFrame",
    "Shard",
    "TrackState",
    "VideoOptions",
    "VideoOutcome",
    "VideoSession",
    "encode_now",
    "prefetch_frames",
    "segment_video",
    "segment_videos",
    "step_batch",
]

__getattr__ = module_getattr(__name__)
