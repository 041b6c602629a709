"""RefCOCO, RefCOCO+ and RefCOCOg: expressions about objects of COCO's train2014 images."""

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refsam.data.dataset import DataError, Expression, ReferringDataset, VideoRecord, image_size
from refsam.data.listings import Part, check_split, demand_parts, read_json
from refsam.data.run_lengths import (
    Arrays,
    RunLengthMasks,
    RunLengthTable,
    encode,
    open_arrays,
    same_aspect,
)
from refsam.errors import named

# Author of the splits -> the splits; the first author's are the usual ones.
SPLITS_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "refcoco": {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")},
    "refcoco+": {"unc": ("train", "val", "testA", "testB")},
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
}
_ARCHIVES = {
    "refcoco": "20220413011718/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco.zip",
    "refcoco+": "20220413011656/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco+.zip",
    "refcocog": "20220413012904/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcocog.zip",
}
_IMAGES = "http://images.cocodataset.org/zips/train2014.zip"
# Folders of COCO's images below the root, as people unpack them.
_IMAGE_FOLDERS = (
    "train2014",
    "images/train2014",
    "images/mscoco/images/train2014",
    "coco/train2014",
)


def variants(name: str, root: Path) -> tuple[dict[str, str], ...]:
    """The arguments that `open_dataset` takes for each split: the usual ones, and others whose files exist."""
    makers = [by for by in SPLITS_BY[name] if _refs_file(root, name, by).is_file()]
    makers = makers or [next(iter(SPLITS_BY[name]))]
    return tuple({"split_by": by, "split": split} for by in makers for split in SPLITS_BY[name][by])


def parts(name: str, root: Path, split: str, split_by: str) -> dict[str, Part]:
    """The files of a split; the official links of the annotations are dead."""
    archive = f"https://web.archive.org/web/{_ARCHIVES[name]}"
    return {
        "expressions": Part(_refs_file(root, name, split_by), archive),
        "frames": Part(_image_folder(root), _IMAGES),
        "masks": Part(root / name / "instances.json", archive),
    }


def open_split(
    name: str, root: Path, split: str, *, split_by: str | None = None, exclude_shared: bool = True
) -> ReferringDataset:
    """One split: each image is a video of one frame, whose expressions have their `sent_id` as number.

    `split_by` says who made the split; by default unc for RefCOCO and RefCOCO+, umd for RefCOCOg. With `exclude_shared` the
    images in a usual evaluation split of any of the three are left out of train: they share COCO's images.
    """
    usual = SPLITS_BY[name]
    split_by = split_by or next(iter(usual))
    if split_by not in usual:
        raise DataError(f"{name}: got split_by {split_by!r}, want one of {', '.join(usual)}")
    check_split(f"{name} ({split_by})", split, usual[split_by])
    places = demand_parts(name, parts(name, root, split, split_by))
    refs = [ref for ref in read_refs(places["expressions"]) if _belongs(ref["split"], split)]
    notes: tuple[str, ...] = ()
    if split == "train" and exclude_shared:
        refs, notes = _without_shared(refs, name, root, split_by)
    elif split == "train":
        notes = (f"{name} train: images of evaluation splits are not excluded",)
    instances = _Instances.of_file(places["masks"])
    by_video, faults = _expressions(refs, instances, places["masks"])
    videos = tuple(VideoRecord(image, (image,), (image,)) for image in by_video)
    return ReferringDataset(
        name,
        split,
        root,
        videos,
        {image: tuple(expressions) for image, expressions in by_video.items()},
        partial(_image_file, places["frames"]),
        RunLengthMasks(instances.masks, _only_frame),
        truth=places["masks"],
        listing=places["expressions"],
        notes=notes,
        faults=faults,
    )


def problems(dataset: ReferringDataset) -> Iterable[tuple[str, str]]:
    """(part, problem) of images whose aspect differs from that of the size recorded with their instances."""
    assert isinstance(dataset.mask_source, RunLengthMasks)
    for video in dataset.videos:
        file = dataset.frame_file(video.name, video.name)
        if not file.is_file():
            continue
        size = image_size(file)
        numbers = [n for e in dataset.expressions(video.name) for n in e.object_ids or ()]
        for height, width in dataset.mask_source.table.sizes_of(numbers):
            if not same_aspect((height, width), size):
                found = f"{file} has {size[1]}x{size[0]} where instances.json says {width}x{height}"
                yield "frames", f"{found} (width x height)"
                break


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The list of a `refs(*).p`, or of the same as JSON; raises DataError.

    The pickle may hold plain data only: anything that would import or call something is refused, not run.
    """
    if path.suffix == ".json":
        refs = read_json(path)
    else:
        try:
            with open(path, "rb") as file:
                refs = _PlainUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a damaged pickle may raise any
            raise DataError(f"{path}: cannot be read as a pickle of plain data: {error}") from error
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise DataError(f"{path}: no list of references")
    return refs


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def _refs_file(root: Path, name: str, split_by: str) -> Path:
    path = root / name / f"refs({split_by}).p"
    converted = path.with_suffix(".json")
    return converted if converted.is_file() and not path.is_file() else path


def _image_folder(root: Path) -> Path:
    found = [root / folder for folder in _IMAGE_FOLDERS if (root / folder).is_dir()]
    return found[0] if found else root / _IMAGE_FOLDERS[0]


def _image_file(folder: Path, video: str, frame: str) -> Path:
    return folder / f"{frame}.jpg"


def _belongs(split: str, wanted: str) -> bool:
    """As in the original tool, testA and testB may be combined with other splits; test covers all of these."""
    if wanted in ("testA", "testB"):
        return "test" in split and wanted[-1] in split
    return "test" in split if wanted == "test" else split == wanted


def _without_shared(
    refs: list[dict[str, Any]], name: str, root: Path, split_by: str
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """References whose image is in no usual evaluation split of the three, nor in one of this split; and notes."""
    usual = {(other, next(iter(by))) for other, by in SPLITS_BY.items()} | {(name, split_by)}
    excluded: set[int] = set()
    unread = []
    for other, by in sorted(usual):
        path = _refs_file(root, other, by)
        if path.is_file():
            excluded |= {ref["image_id"] for ref in read_refs(path) if ref["split"] != "train"}
        else:
            unread.append(f"evaluation images of {other} ({by}) are not excluded: no {path}")
    kept = [ref for ref in refs if ref["image_id"] not in excluded]
    dropped = {ref["image_id"] for ref in refs} & excluded
    note = (
        f"train: left out {len(dropped)} images ({len(refs) - len(kept)} objects) that are in evaluation splits of the "
        "RefCOCO family"
    )
    return kept, (note, *unread)


@dataclass(frozen=True)
class _Instances:
    """An `instances.json`: file stems by image, and the masks of all objects."""

    images: NDArray[np.int64]
    stems: NDArray[np.bytes_]
    masks: RunLengthTable

    @staticmethod
    def of_file(path: Path) -> "_Instances":
        arrays = open_arrays(path, lambda: _read_instances(path))
        images, stems = arrays.pop("images"), arrays.pop("stems")
        return _Instances(images, stems, RunLengthTable(**arrays))

    def stem(self, image: int) -> str | None:
        """The stem of an image's file, None for one that is not listed."""
        row = int(np.searchsorted(self.images, image))
        is_listed = row < len(self.images) and self.images[row] == image
        return bytes(self.stems[row]).decode() if is_listed else None


def _read_instances(path: Path) -> Arrays:
    """The arrays of `_Instances`; raises DataError. An object without a usable outline has no code."""
    content = read_json(path)
    try:
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        tracks = {
            item["id"]: [encode(item["segmentation"], sizes[item["image_id"]])]
            for item in content["annotations"]
        }
        order = sorted(stems)
        table = vars(RunLengthTable.of_tracks(tracks))
        return {
            "images": np.array(order, np.int64),
            "stems": np.array([stems[image].encode() for image in order], np.bytes_),
            **table,
        }
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not in COCO's format: {error!r}") from error


def _only_frame(video: str, frame: str) -> int:
    return 0


def _expressions(
    refs: Iterable[Mapping[str, Any]], instances: _Instances, path: Path
) -> tuple[dict[str, list[Expression]], tuple[str, ...]]:
    """Expressions by image, and the objects that were left out because they have no outline.

    The file names in `refs` end with the object's number; the instances have the right ones.
    """
    found: dict[str, list[Expression]] = {}
    without: dict[str, None] = {}
    for ref in refs:
        image, number = instances.stem(ref["image_id"]), ref["ann_id"]
        if image is None or instances.masks.row(number) is None:
            missing = f"image {ref['image_id']}" if image is None else f"object {number}"
            raise DataError(f"{path}: no {missing}, which reference {ref.get('ref_id')} means")
        if instances.masks.code(number, 0) is None:
            without[f"object {number} of {image}"] = None
            continue
        for entry in ref["sentences"]:
            found.setdefault(image, []).append(
                Expression(image, str(entry["sent_id"]), entry["sent"], (number,))
            )
    if not without:
        return found, ()
    return found, (f"left out, as they have no outline of three corners: {named(list(without))}",)
