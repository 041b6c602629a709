"""MeViS: expressions about the motion of several objects, with masks as run lengths in one large JSON file."""

from pathlib import Path

from refsam.data.dataset import DataError, ReferringDataset
from refsam.data.listings import (
    Listed,
    Part,
    check_split,
    demand_parts,
    open_listed,
    read_json,
    read_videos,
)
from refsam.data.run_lengths import (
    Arrays,
    Code,
    RunLengthMasks,
    RunLengthTable,
    compressed,
    open_arrays,
)

_SITE = "https://github.com/henghuiding/MeViS"
OFFICIAL_VIDEOS = {"train": 1662, "valid_u": 50, "valid": 140, "test": 154}


def parts(name: str, root: Path, split: str) -> dict[str, Part]:
    """The files of a split; the truth of valid and test is not public."""
    public = split in ("train", "valid_u")
    return {
        "expressions": Part(root / split / "meta_expressions.json", _SITE),
        "frames": Part(root / split / "JPEGImages", _SITE),
        "masks": Part(
            root / split / "mask_dict.json", _SITE if public else "nowhere: not public", public
        ),
    }


def open_split(name: str, root: Path, split: str) -> ReferringDataset:
    """One split. An expression's `object_ids` are its `anno_id`s: any number of them, none where it means nothing."""
    check_split(name, split, OFFICIAL_VIDEOS)
    places = demand_parts(name, parts(name, root, split))
    source = None
    notes: tuple[str, ...] = (f"{split}: no truth in {places['masks']}; see {_SITE}",)
    if places["masks"].is_file():
        listed = read_videos(places["expressions"])
        # Run lengths are in the order of the list, not by name.
        positions = {
            video: {frame: index for index, frame in enumerate(entry["frames"])}
            for video, entry in listed.items()
        }
        arrays = open_arrays(places["masks"], lambda: _read_tracks(places["masks"]))
        source, notes = RunLengthMasks(RunLengthTable(**arrays), Listed(positions)), ()
    return open_listed(name, split, root, places, source, "anno_id", notes=notes)


def _read_tracks(path: Path) -> Arrays:
    """The table of a `mask_dict.json`; raises DataError where it is not in that format."""
    tracks: dict[int, list[Code | None]] = {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: no mask_dict.json, want an object of lists by object number")
    for number, codes in content.items():
        try:
            tracks[int(number)] = [None if code is None else compressed(code) for code in codes]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: object {number}: {error!r}") from error
    return vars(RunLengthTable.of_tracks(tracks))
