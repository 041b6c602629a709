"""Long-RVOS (arXiv 2505.12702): videos of a minute. Each object has a folder of masks, without a file where it is not seen."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refsam.data.dataset import Expression, Mask, ReferringDataset
from refsam.data.listings import Part, check_split, demand_parts, open_listed, read_videos
from refsam.data.masks import read_numbers

_SITE = "https://huggingface.co/datasets/iSEE-Laboratory/Long-RVOS"
OFFICIAL_VIDEOS = {"train": 1855, "valid": 112, "test": 226}


@dataclass(frozen=True)
class ObjectFolders:
    """PNGs `<folder>/<video>/<object>/<frame>.png`, not 0 where the object is; a file that is not there is an empty mask."""

    folder: Path

    def __call__(self, expression: Expression, frame: str, size: tuple[int, int]) -> Mask | None:
        """The union of the expression's objects; None if the dataset does not give them."""
        if expression.object_ids is None:
            return None
        files = [self.file(expression.video, number, frame) for number in expression.object_ids]
        masks = [read_numbers(path) != 0 for path in files if path.is_file()]
        return np.logical_or.reduce(masks) if masks else np.zeros(size, bool)

    def has(self, expression: Expression, frame: str) -> bool:
        """Whether the expression's objects have folders."""
        numbers = expression.object_ids or ()
        return all((self.folder / expression.video / str(n)).is_dir() for n in numbers)

    def file(self, video: str, number: int, frame: str) -> Path:
        """File of an object's mask; it exists only if the object is visible."""
        return self.folder / video / str(number) / f"{frame}.png"


def parts(name: str, root: Path, split: str) -> dict[str, Part]:
    """The files of a split."""
    return {
        "expressions": Part(root / split / "meta_expressions.json", _SITE),
        "frames": Part(root / split / "JPEGImages", _SITE),
        "masks": Part(root / split / "Annotations", _SITE, needed=split == "train"),
    }


def open_split(name: str, root: Path, split: str) -> ReferringDataset:
    """One split. Only the lists are held in memory: a video of any length is read frame by frame."""
    check_split(name, split, OFFICIAL_VIDEOS)
    places = demand_parts(name, parts(name, root, split))
    has_truth = places["masks"].is_dir()
    masks = ObjectFolders(places["masks"]) if has_truth else None
    notes = () if has_truth else (f"{split}: no truth in {places['masks']}; see {_SITE}",)
    return open_listed(name, split, root, places, masks, "obj_id", notes=notes)


def expression_types(dataset: ReferringDataset) -> dict[tuple[str, str], str]:
    """static, dynamic or hybrid by (video, expression), where the list has it."""
    assert dataset.listing is not None  # open_split names it
    return {
        (video, number): str(entry["type"])
        for video, content in read_videos(dataset.listing).items()
        for number, entry in content["expressions"].items()
        if "type" in entry
    }
