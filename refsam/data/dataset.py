"""The interface of every dataset of videos and referring expressions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refsam import images
from refsam.errors import UserError


class DataError(UserError):
    """A dataset that is missing or not in its format; the message says where to get it."""


class UnreadableError(DataError):
    """One file of a dataset that cannot be decoded; training may skip the samples that need it."""


@dataclass(frozen=True)
class VideoRecord:
    """A video, or an image as a video of one frame.

    `frame_names` in order of time; `annotated` those that have a true mask (the same for most datasets, empty where the truth is
    not public).
    """

    name: str
    frame_names: tuple[str, ...]
    annotated: tuple[str, ...]


@dataclass(frozen=True)
class Expression:
    """A referring expression about a video.

    `expression_id` is unique within the video, as the dataset spells it; `object_ids` says which of the truth's objects are meant
    (empty: nothing in the video; None: not given by the dataset); `annotator` counts the persons of Ref-DAVIS17, 0 to 3.
    """

    video: str
    expression_id: str
    text: str
    object_ids: tuple[int, ...] | None
    annotator: int | None = None


Mask = NDArray[np.bool_]


class MaskSource(Protocol):
    """Reads the masks of a dataset; see `refsam.data.masks`."""

    def __call__(self, expression: Expression, frame: str, size: tuple[int, int]) -> Mask | None:
        """The mask (H, W) bool of an expression in a frame of `size` (height, width)."""

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether the mask is there, without decoding it."""


@dataclass(frozen=True)
class ReferringDataset:
    """One split of a dataset. It holds the lists and the names of the files; pixels are read when they are asked for.

    `videos` are in the order of the dataset's protocol, `expressions_by_video` in file order. Datasets differ in
    `frame_file(video, frame)` and `mask_source` only; `mask_source` is None where there is no truth.
    `truth` is the file or folder that `refsam.evaluation.scoring.masks` reads, `listing` the file of the expressions.
    `notes` tell a reader of results what was left out and why; `faults` say what was left out because it is wrong.
    Instances can be pickled.
    """

    name: str
    split: str
    root: Path
    videos: tuple[VideoRecord, ...]
    expressions_by_video: Mapping[str, tuple[Expression, ...]]
    frame_file: Callable[[str, str], Path]
    mask_source: MaskSource | None
    truth: Path | None = None
    listing: Path | None = None
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def expressions(self, video: str) -> tuple[Expression, ...]:
        """All expressions about a video, in file order."""
        return self.expressions_by_video[video]

    def frame(self, video: str, frame: str) -> NDArray[np.uint8]:
        """A frame (H, W, 3) uint8 RGB, grey images included; raises UnreadableError."""
        return np.asarray(read_image(self.frame_file(video, frame))[0])

    def mask(
        self, expression: Expression, frame: str, size: tuple[int, int] | None = None
    ) -> Mask | None:
        """The true mask (H, W) bool of all that an expression means in a frame; None where there is no truth.

        `size` (height, width) is the frame's, read from its file if it is not given. Raises UnreadableError for a file that
        cannot be decoded, DataError for a mask of another size than its frame.
        """
        if self.mask_source is None:
            return None
        if size is None:
            size = image_size(self.frame_file(expression.video, frame))
        mask = self.mask_source(expression, frame, size)
        if mask is not None and mask.shape != size:
            raise DataError(
                f"{self.name}: the mask of {expression.video}/{frame} is {mask.shape[1]}x{mask.shape[0]}, "
                f"its frame {size[1]}x{size[0]} (width x height)"
            )
        return mask


def read_image(
    path: Path, wanted: Callable[[tuple[int, int]], tuple[int, int]] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """As `refsam.images.read_image`; raises UnreadableError."""
    try:
        return images.read_image(path, wanted)
    except images.ImageError as error:
        raise UnreadableError(f"{path}: {error.problem}") from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from an image's header, as it is shown; raises UnreadableError."""
    try:
        return images.image_size(path)
    except images.ImageError as error:
        raise UnreadableError(f"{path}: {error.problem}") from error
