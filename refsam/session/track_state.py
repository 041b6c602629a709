"""A session's state as bytes that another process can read."""

import json
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from refsam.errors import UserError


@dataclass(frozen=True)
class TrackState:
    """The track tokens after a frame.

    Attributes:
        track: ``(E, C)``, None before the first frame.
        has_track: for each expression whether its token counts.
        frame_index: number of the next frame.
    """

    track: Tensor | None
    has_track: tuple[bool, ...]
    frame_index: int

    def to_bytes(self) -> bytes:
        """The same in the safetensors format."""
        tensors = {} if self.track is None else {"track": self.track.detach().cpu().contiguous()}
        facts = {"has_track": list(self.has_track), "frame_index": self.frame_index}
        return save(tensors, metadata={"state": json.dumps(facts)})

    @staticmethod
    def from_bytes(content: bytes) -> "TrackState":
        """Read what `to_bytes` wrote; raises UserError for anything else."""
        try:
            length = int.from_bytes(content[:8], "little")
            facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["state"])
            track = load(content).get("track")
            return TrackState(
                track, tuple(map(bool, facts["has_track"])), int(facts["frame_index"])
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the state of the run cannot be read ({error}): start again with --overwrite"
            ) from error
