"""Run a model on a benchmark's video frame by frame, and make masks of its logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from refsam.errors import UserError
from refsam.evaluation.runners.speed import StageClock
from refsam.model import PromptedSAM
from refsam.runtime.device import autocast
from refsam.session import EncodedFrame, VideoSession, encode_now
from refsam_kernels import mask_postprocess

MergeRule = Literal["probabilities", "logits"]
BACKGROUND = 0.1
_NOWHERE = -1e4  # the logit of an expression that the model refuses: below every threshold


@dataclass(frozen=True)
class InferenceRules:
    """Choices between a frame and its masks that change scores, and `notes` that describe them.

    `short_side`: frames are first resized to it, unless it is None. `lower_case`: expressions are changed to lower case.
    `threshold`: a pixel belongs to a mask if its logit is higher. `merge`: how several objects share the pixels of one map.
    """

    name: str
    notes: tuple[str, ...]
    short_side: int | None = None
    lower_case: bool = False
    threshold: float = 0.0
    merge: MergeRule = "probabilities"

    def text(self, expression: str) -> str:
        """The expression as the model is given it."""
        return expression.lower() if self.lower_case else expression


MERGE_NOTES: Mapping[MergeRule, str] = MappingProxyType(
    {
        "probabilities": "Joint map: probabilities under 0.5 become 0, the background has 0.1, the highest wins.",
        "logits": "Joint map: logits under 0 become 0, the background has 0.1, the highest wins: an object needs a "
        "logit above 0.1 (probability 0.525). This is the authors' rule.",
    }
)

RULES: Mapping[str, InferenceRules] = MappingProxyType(
    {
        "default": InferenceRules(
            "default",
            (
                "Frames: as they are; the model alone resizes them, longest side to its own size.",
                "Masks: logits above 0 after bilinear resizing to the frame's size.",
                "State: one track token for each video and expression (and annotator), never shared.",
            ),
        ),
        "paper": InferenceRules(
            "paper",
            (
                "Frames: short side to 360 pixels first (bilinear, aspect kept), as the authors do; detail is lost by it.",
                "Expressions: lower case, single blanks, as the authors do.",
                "Masks: logits resized to the 360-pixel frame, then to the frame's own size, above 0.01, as the authors do.",
                "State: one track token for each video and expression (and annotator). The authors' Ref-DAVIS17 script lets "
                "the four annotators share tokens; that fault is not reproduced.",
                "The authors evaluate Ref-YouTube-VOS and Ref-DAVIS17 alone: elsewhere their choices for the former are used.",
                "Not known: whether the 360-pixel resizing was antialiased (here it is; it depended on torchvision's version), "
                "whether pixels reached SAM as 0-1 or 0-255 (here 0-255), and which weights gave the published scores.",
            ),
            short_side=360,
            lower_case=True,
            threshold=0.01,
            merge="logits",
        ),
    }
)


def find_rules(name: str) -> InferenceRules:
    """The rules of that name; UserError if there are none."""
    if name not in RULES:
        raise UserError(f"inference: got {name!r}, want one of {', '.join(RULES)}")
    return RULES[name]


@dataclass(frozen=True)
class GroupLogits:
    """The logits of a group of E expressions in one frame.

    `logits` `(E, 4h, 4w)` float32 over the model's square of side `image_size`; the frame fills `input_size` of it.
    `seen_size` is the frame's size as the model was given it, `size` its own. Sizes are (height, width).
    """

    logits: Tensor
    image_size: int
    input_size: tuple[int, int]
    seen_size: tuple[int, int]
    size: tuple[int, int]

    def at_full_size(self) -> Tensor:
        """Logits `(E, H, W)` at the frame's own size, by SAM's two bilinear resizes and, where it was resized, a third."""
        side = (self.image_size, self.image_size)
        height, width = self.input_size
        logits = _resize(self.logits[None], side)[..., :height, :width]
        logits = _resize(logits, self.seen_size)
        return (logits if self.seen_size == self.size else _resize(logits, self.size))[0]

    def masks(self, threshold: float) -> NDArray[np.bool_]:
        """Masks `(E, H, W)` on the host: logits above the threshold."""
        if self.seen_size != self.size:
            return (self.at_full_size() > threshold).cpu().numpy()
        masks = mask_postprocess(
            self.logits,
            image_size=self.image_size,
            input_size=self.input_size,
            output_size=self.size,
            threshold=threshold,
        )
        return masks.cpu().numpy()

    def merged_map(self, numbers: Sequence[int], rule: MergeRule) -> NDArray[np.uint8]:
        """A map `(H, W)` of object numbers, 0 the background; `numbers` are those of the E expressions."""
        scores = self.at_full_size()
        if rule == "probabilities":
            scores = scores.sigmoid()
            scores = torch.where(scores < 0.5, 0.0, scores)
        else:
            scores = scores.clamp(min=0)
        background = scores.new_full((1, *self.size), BACKGROUND)
        winner = torch.cat([background, scores]).argmax(dim=0)
        return np.array([0, *numbers], dtype=np.uint8)[winner.cpu().numpy()]


class VideoPredictor:
    """The model on one video: frames in, logits of every group of expressions out.

    Expressions of one group are computed together; each has its own track token. The groups depend on the video alone, so
    results do not depend on how processes share the videos. Expressions in `refused` get no mask in any frame.
    """

    def __init__(
        self,
        model: PromptedSAM,
        rules: InferenceRules,
        groups: Sequence[Sequence[str]],
        *,
        precision: torch.dtype = torch.float32,
        clock: StageClock | None = None,
        refused: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model
        self.rules = rules
        self.clock = clock or StageClock()
        self._autocast = autocast(model.device, precision)
        self._counts = [len(group) for group in groups]
        self._known = [[i for i, text in enumerate(g) if text not in refused] for g in groups]
        with self.clock.stage("prompt"), self._autocast:
            self._sessions = [
                VideoSession(model, [rules.text(group[i]) for i in known], optimize=False)
                for group, known in zip(groups, self._known, strict=True)
            ]

    def step(self, frame: NDArray[np.uint8]) -> list[GroupLogits]:
        """Logits of each group in the next frame `(H, W, 3)` uint8 RGB."""
        seen = _with_short_side(frame, self.rules.short_side)
        with torch.no_grad(), self._autocast:
            with self.clock.stage("encode"):
                encoded = encode_now(self.model, seen.copy())
            with self.clock.stage("decode masks"):
                return [
                    self._logits(index, encoded, frame.shape[:2])
                    for index in range(len(self._sessions))
                ]

    def _logits(self, index: int, frame: EncodedFrame, size: tuple[int, ...]) -> GroupLogits:
        """Logits of a group; those of refused expressions mark no pixel."""
        side = 4 * max(frame.image.grid)
        logits = torch.full((self._counts[index], side, side), _NOWHERE, device=self.model.device)
        if self._known[index]:
            logits[self._known[index]] = self._sessions[index].step_logits(frame).logits
        sizes = frame.size.resized, frame.size.original, (size[0], size[1])
        return GroupLogits(logits, self.model.image_size, *sizes)


def _with_short_side(frame: NDArray[np.uint8], short_side: int | None) -> NDArray[np.uint8]:
    height, width = frame.shape[:2]
    if short_side is None or min(height, width) == short_side:
        return frame
    if height <= width:
        size = (int(short_side * width / height), short_side)
    else:
        size = (short_side, int(short_side * height / width))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)
