"""A photograph with the objects in it, and single objects cut out of photographs."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from refsam.data.photographs.folder import UNSURE, PhotoFolder, Photograph

# A class without instances counts as one object if this share of it is connected; otherwise its largest piece does if it is
# this many times as large as the next.
_ONE_PIECE = 0.95
_STANDS_OUT = 2.5
# An object is cut out of its photograph where at most this share of its box's outline lies on the photograph's border.
_MOST_ON_BORDER = 0.12
_LEAST_AREA, _MOST_AREA = 0.015, 0.75
_SEAM = 4  # pixels kept around a cut-out


@dataclass(frozen=True)
class Thing:
    """An object, or all objects of a class that are not labelled separately (`single` false)."""

    name: str
    single: bool


@dataclass(frozen=True)
class Picture:
    """An image with the truth about its pixels.

    `image (H, W, 3)` uint8 RGB; `owner (H, W)` uint8: 0 nothing, n the thing `things[n - 1]`, 255 unsure; `garments (H, W)`
    uint8, numbered as the folder's `garments`, None where they are not labelled. `complete` as in `Photograph`.
    """

    image: NDArray[np.uint8]
    owner: NDArray[np.uint8]
    things: tuple[Thing, ...]
    garments: NDArray[np.uint8] | None = None
    complete: bool = False

    def crop(self, top: int, bottom: int, left: int, right: int) -> "Picture":
        """The rectangle of these rows and columns, `bottom` and `right` not included."""
        part = np.s_[top:bottom, left:right]
        garments = None if self.garments is None else self.garments[part]
        return replace(self, image=self.image[part], owner=self.owner[part], garments=garments)


def without_things(image: NDArray[np.uint8]) -> Picture:
    """An image (H, W, 3) uint8 RGB as a picture in which there is nothing to find."""
    return Picture(image, np.zeros(image.shape[:2], np.uint8), ())


def read_picture(folder: PhotoFolder, photograph: Photograph) -> Picture:
    """A photograph with the contents of its label, instances and parts; raises UnreadableError."""
    labels = folder.map(photograph.label)
    owner = np.where(labels == UNSURE, UNSURE, 0).astype(np.uint8)
    things: list[Thing] = []
    left = (labels != UNSURE) & (labels != 0)
    if photograph.instances:
        instances = folder.map(photograph.instances)
        for number in np.unique(instances[left]):
            if number in (0, UNSURE) or len(things) == UNSURE - 1:
                continue
            where = (instances == number) & left
            label = int(np.bincount(labels[where]).argmax())
            where &= labels == label
            things.append(Thing(folder.names[label], True))
            owner[where] = len(things)
            left &= ~where
    for label in np.unique(labels[left]):
        name, where = folder.names[int(label)], left & (labels == label)
        main = _main_piece(where)
        for piece, single in ((main, True), (where & ~main, False)):
            if piece.any():
                things.append(Thing(name, single))
                owner[piece] = len(things)
    garments = folder.map(photograph.parts) if photograph.parts else None
    return Picture(
        folder.image(photograph.image), owner, tuple(things), garments, photograph.complete
    )


def _main_piece(where: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The whole mask if nearly all of it is connected, else its piece that is by far the largest, else nothing."""
    pieces, count = ndimage.label(where)
    sizes = np.bincount(pieces.ravel())[1:]
    first, second = np.partition(sizes, -2)[-1:-3:-1] if count > 1 else (sizes[0], 0)
    if first >= _ONE_PIECE * sizes.sum():
        return where
    if first < _STANDS_OUT * second:
        return np.zeros_like(where)
    main: NDArray[np.bool_] = pieces == 1 + sizes.argmax()
    return main


def cut_out(picture: Picture, number: int) -> Picture | None:
    """Thing `number` alone with a margin around it, as thing 1; None where it is no single object, or too much of it is cut off.

    Pixels of other things and of none are 0 in `owner`; unsure ones that touch the object stay unsure.
    """
    if not picture.things[number - 1].single:
        return None
    where = picture.owner == number
    if not _LEAST_AREA <= where.mean() <= _MOST_AREA:
        return None
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    on_border = sum(int(edge.sum()) for edge in (where[0], where[-1], where[:, 0], where[:, -1]))
    if on_border > _MOST_ON_BORDER * 2 * (height + width):
        return None
    unsure = (picture.owner == UNSURE) & ndimage.binary_dilation(where, iterations=_SEAM)
    owner = np.where(where, 1, np.where(unsure, UNSURE, 0)).astype(np.uint8)
    alone = replace(picture, owner=owner, things=(picture.things[number - 1],))
    top, left = max(0, rows[0] - _SEAM), max(0, columns[0] - _SEAM)
    return alone.crop(top, rows[-1] + 1 + _SEAM, left, columns[-1] + 1 + _SEAM)
