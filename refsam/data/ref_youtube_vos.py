"""Ref-YouTube-VOS, and the layout that Ref-DAVIS17 shares with it once it is prepared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refsam.data.dataset import MaskSource, ReferringDataset
from refsam.data.listings import FrameFolder, check_split, demand, read_videos, records
from refsam.data.masks import BinaryMasks, NumberedMasks

SPLITS = ("train", "valid", "test")
SOURCES = {
    "expressions": "https://youtube-vos.org/dataset/rvos/ (meta_expressions; the test list is no longer offered)",
    "frames": "https://youtube-vos.org/dataset/rvos/ (train.zip is YouTube-VOS 2019's own)",
    "masks": "https://youtube-vos.org/dataset/rvos/ (train.zip); of valid: "
    "https://github.com/skynbe/Refer-Youtube-VOS/issues/8 (Google Drive)",
}
# How many videos of the validation list are the validation set; the others are the test set's.
_VALID_VIDEOS = 202


def open_split(name: str, root: Path, split: str) -> ReferringDataset:
    """One split; `train/meta.json`, which holds categories only, is not needed."""
    check_split(name, split, SPLITS)
    return open_layout(name, root, split, SOURCES)


def parts(root: Path, split: str) -> dict[str, Path]:
    """What a split is made of, by the names of `SOURCES`."""
    return {
        "expressions": root / "meta_expressions" / split / "meta_expressions.json",
        "frames": root / split / "JPEGImages",
        "masks": root / split / "Annotations",
    }


def open_layout(name: str, root: Path, split: str, sources: Mapping[str, str]) -> ReferringDataset:
    """A split in the layout of Ref-YouTube-VOS."""
    places = parts(root, split)
    for part in ("expressions", "frames"):
        demand(name, places[part], sources[part])
    listed = read_videos(places["expressions"])
    names: list[str] = list(listed)
    notes: tuple[str, ...] = ()
    if split == "valid" and name == "ref-youtube-vos":
        names, notes = _validation_videos(root, listed)
    source = _mask_source(places["masks"], listed, names)
    if source is None:
        notes += (f"{split}: no truth in {places['masks']}; it comes from {sources['masks']}",)
    videos, sentences = records(places["expressions"], listed, names, source is not None, _objects)
    return ReferringDataset(
        name,
        split,
        root,
        videos,
        sentences,
        FrameFolder(places["frames"]),
        source,
        truth=None if source is None else places["masks"],
        listing=places["expressions"],
        notes=notes,
    )


def _objects(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    return (int(entry["obj_id"]),) if "obj_id" in entry else None


def _validation_videos(root: Path, listed: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """The validation list names the test videos too: those of the test list, or those without frames, are not valid's."""
    test_list = parts(root, "test")["expressions"]
    if test_list.is_file():
        names = sorted(set(listed) - set(read_videos(test_list)))
        rule = f"listed but not in {test_list}"
    else:
        frames = parts(root, "valid")["frames"]
        names = sorted(video for video in listed if (frames / video).is_dir())
        rule = f"listed and with frames in {frames}"
    notes = f"valid: {len(names)} of {len(listed)} listed videos, those {rule}"
    if len(names) != _VALID_VIDEOS:
        notes += f"; the official set has {_VALID_VIDEOS}"
    return names, (notes,)


def _mask_source(folder: Path, listed: Mapping[str, Any], names: list[str]) -> MaskSource | None:
    """Maps of object numbers where the list tells the objects, else one folder of binary masks for each expression."""
    if not folder.is_dir():
        return None
    expressions = [(name, listed[name].get("expressions", {})) for name in names]
    if all("obj_id" in entry for _, entries in expressions for entry in entries.values()):
        return NumberedMasks(folder)
    if any(
        (folder / name / number).is_dir() for name, numbers in expressions for number in numbers
    ):
        return BinaryMasks(folder)
    return None
