"""Your own videos divided, each as a whole, into those to train on and those to validate on."""

import csv
from pathlib import Path

import numpy as np

from refsam.data.catalogue import open_dataset
from refsam.data.dataset import DataError, ReferringDataset
from refsam.data.new_folder import new_folder, place

TRAIN, VALIDATION = "train", "validation"


def split_folder(
    root: Path,
    out: Path,
    *,
    split: str = TRAIN,
    share: float = 0.2,
    seed: int = 0,
    copy: bool = False,
) -> dict[str, list[str]]:
    """Write the splits train and validation of your own videos into the new folder `out`; returns the videos of each.

    `share` of the videos, at least one but never all, are for validation, drawn from `seed`. Frames and masks become symbolic
    links, or copies with `copy`; `root` stays as it is. Raises DataError for fewer than two videos, for a share that is not
    between 0 and 1, and where `out` exists.
    """
    if not 0 < share < 1:
        raise DataError(f"validation: got {share}, want a share between 0 and 1")
    dataset = open_dataset("folder", root, split)
    names = [video.name for video in dataset.videos]
    if len(names) < 2:
        raise DataError(f"{root}: {len(names)} video cannot be divided, want two or more")
    count = min(len(names) - 1, max(1, round(share * len(names))))
    drawn = set(np.random.default_rng(seed).choice(names, count, replace=False).tolist())
    parts = {
        TRAIN: [name for name in names if name not in drawn],
        VALIDATION: [name for name in names if name in drawn],
    }
    with new_folder(out) as partial:
        for part, videos in parts.items():
            _write_part(partial / part, root / split, dataset, videos, copy)
    return parts


def _write_part(
    folder: Path, source: Path, dataset: ReferringDataset, videos: list[str], copy: bool
) -> None:
    folder.mkdir(parents=True)
    with open(folder / "expressions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["video", "objects", "text"])
        for e in (e for video in videos for e in dataset.expressions(video)):
            table.writerow([e.video, " ".join(map(str, e.object_ids or ())), e.text])
    for kind in ("frames", "masks"):
        for video in videos:
            if (source / kind / video).is_dir():
                place(source / kind / video, folder / kind / video, copy)
