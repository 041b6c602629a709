"""Ref-YouTube-VOS, and the layout that Ref-DAVIS17 shares with it once it is prepared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refsam.data.dataset import MaskSource, ReferringDataset
from refsam.data.listings import (
    FrameFolder,
    Part,
    check_split,
    demand_parts,
    open_listed,
    read_videos,
)
from refsam.data.masks import BinaryMasks, NumberedMasks

OFFICIAL_VIDEOS = {"train": 3471, "valid": 202, "test": 305}
_SITE = "https://youtube-vos.org/dataset/rvos/"
_VALID_TRUTH = "https://github.com/skynbe/Refer-Youtube-VOS/issues/8 (its author's Google Drive)"


def open_split(name: str, root: Path, split: str) -> ReferringDataset:
    """One split; `train/meta.json`, which holds categories only, is not needed."""
    check_split(name, split, OFFICIAL_VIDEOS)
    return open_layout(name, root, split, parts(name, root, split))


def parts(name: str, root: Path, split: str) -> dict[str, Part]:
    """The files of a split."""
    videos = f"{_SITE} ({split}.zip{', as of YouTube-VOS 2019' if split == 'train' else ''})"
    masks = {"train": videos, "valid": _VALID_TRUTH}.get(split, "nowhere: not public")
    return layout(root, split, f"{_SITE} (meta_expressions)", videos, masks)


def layout(root: Path, split: str, expressions: str, frames: str, masks: str) -> dict[str, Part]:
    """The parts of a split in this layout, from three sources."""
    return {
        "expressions": Part(
            root / "meta_expressions" / split / "meta_expressions.json", expressions
        ),
        "frames": Part(root / split / "JPEGImages", frames),
        "masks": Part(root / split / "Annotations", masks, needed=split == "train"),
    }


def open_layout(name: str, root: Path, split: str, parts: Mapping[str, Part]) -> ReferringDataset:
    """A split in the layout of Ref-YouTube-VOS."""
    places = demand_parts(name, parts)
    listed = read_videos(places["expressions"])
    names: list[str] = list(listed)
    notes: tuple[str, ...] = ()
    if split == "valid" and name == "ref-youtube-vos":
        names, notes = _validation_videos(root, listed)
    source = _mask_source(places["masks"], listed, names)
    if source is None:
        notes += (f"{split}: no truth in {places['masks']}; it comes from {parts['masks'].source}",)
    return open_listed(name, split, root, places, source, "obj_id", names=names, notes=notes)


def _validation_videos(root: Path, listed: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """The validation list names the test videos too: those that the test list has, or that have no frames, are left out."""
    test_list = parts("ref-youtube-vos", root, "test")["expressions"].path
    if test_list.is_file():
        names = sorted(set(listed) - set(read_videos(test_list)))
        rule = f"listed but not in {test_list}"
    else:
        frames = root / "valid/JPEGImages"
        names = sorted(video for video in listed if (frames / video).is_dir())
        rule = f"listed and with frames in {frames}"
    note = f"valid: {len(names)} of {len(listed)} listed videos, those {rule}"
    if len(names) != OFFICIAL_VIDEOS["valid"]:
        note += f"; the official set has {OFFICIAL_VIDEOS['valid']}"
    return names, (note,)


def _mask_source(folder: Path, listed: Mapping[str, Any], names: list[str]) -> MaskSource | None:
    """Maps of object numbers where the list names objects, else one folder of binary masks for each expression."""
    if not folder.is_dir():
        return None
    expressions = [(name, listed[name].get("expressions", {})) for name in names]
    if any("obj_id" in entry for _, entries in expressions for entry in entries.values()):
        return NumberedMasks(FrameFolder(folder, ".png"))
    if any(
        (folder / name / number).is_dir() for name, numbers in expressions for number in numbers
    ):
        return BinaryMasks(folder)
    return None
