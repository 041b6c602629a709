"""RefCOCO, RefCOCO+ and RefCOCOg: sentences about objects of COCO's train2014 images."""

import pickle
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refsam.data.dataset import DataError, Expression, ReferringDataset, VideoRecord
from refsam.data.listings import Part, check_split, demand_parts, read_json
from refsam.data.masks import PolygonMasks

# What a damaged pickle may raise.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
)
# Who split it -> the splits; the first one is the usual.
SPLITS_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "refcoco": {
        "unc": ("train", "val", "testA", "testB"),
        "google": ("train", "val", "test"),
    },
    "refcoco+": {"unc": ("train", "val", "testA", "testB")},
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
}
_ARCHIVES = {
    "refcoco": "20220413011718/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco.zip",
    "refcoco+": "20220413011656/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco+.zip",
    "refcocog": "20220413012904/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcocog.zip",
}
_IMAGES = "http://images.cocodataset.org/zips/train2014.zip"
# Where people unpack COCO's images, below the root.
_IMAGE_FOLDERS = (
    "train2014",
    "images/train2014",
    "images/mscoco/images/train2014",
    "coco/train2014",
)


def variants(name: str, root: Path) -> tuple[dict[str, str], ...]:
    """The arguments that `open_dataset` takes for each split, of the usual makers and of those whose files are there."""
    makers = [by for by in SPLITS_BY[name] if _refs_file(root, name, by).is_file()]
    makers = makers or [next(iter(SPLITS_BY[name]))]
    return tuple({"split_by": by, "split": split} for by in makers for split in SPLITS_BY[name][by])


def parts(name: str, root: Path, split: str, split_by: str) -> dict[str, Part]:
    """What a split is made of; the official links of the annotations are dead."""
    archive = f"https://web.archive.org/web/{_ARCHIVES[name]}"
    return {
        "expressions": Part(_refs_file(root, name, split_by), archive),
        "frames": Part(_image_folder(root), _IMAGES),
        "masks": Part(root / name / "instances.json", archive),
    }


def open_split(
    name: str,
    root: Path,
    split: str,
    *,
    split_by: str | None = None,
    exclude_shared: bool = True,
) -> ReferringDataset:
    """One split: each image is a video of one frame, each sentence an expression whose number is its `sent_id`.

    `split_by` is who made the split: unc for RefCOCO and RefCOCO+, umd for RefCOCOg unless given. With `exclude_shared` the
    images that any of the three has in a usual evaluation split are left out of train: they share COCO's images.
    """
    usual = SPLITS_BY[name]
    split_by = split_by or next(iter(usual))
    if split_by not in usual:
        raise DataError(f"{name}: got split_by {split_by!r}, want one of {', '.join(usual)}")
    check_split(f"{name} ({split_by})", split, usual[split_by])
    places = demand_parts(name, parts(name, root, split, split_by))
    refs = [ref for ref in read_refs(places["expressions"]) if _belongs(ref["split"], split)]
    excluded, notes = _shared_images(name, root, split_by) if split == "train" else (set(), ())
    if exclude_shared and split == "train":
        refs, notes = _without(refs, excluded, notes)
    elif split == "train":
        notes = (f"{name} train: images of evaluation splits are not excluded",)
    images, segmentations = _instances(places["masks"], refs)
    sentences = _sentences(refs, images, segmentations, places["masks"])
    videos = tuple(VideoRecord(image, (image,), (image,)) for image in sentences)
    return ReferringDataset(
        name,
        split,
        root,
        videos,
        {image: tuple(expressions) for image, expressions in sentences.items()},
        partial(_image_file, places["frames"]),
        PolygonMasks(segmentations),
        truth=places["masks"],
        listing=places["expressions"],
        notes=notes,
    )


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
        except _PICKLE_ERRORS as error:
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
    """testA and testB may be written together with others, as in the original tool; test covers all of these."""
    if wanted in ("testA", "testB"):
        return "test" in split and wanted[-1] in split
    return "test" in split if wanted == "test" else split == wanted


def _shared_images(name: str, root: Path, split_by: str) -> tuple[set[int], tuple[str, ...]]:
    """COCO images of the usual evaluation splits of all three and of this one, and what could not be looked into."""
    usual = {(other, next(iter(by))) for other, by in SPLITS_BY.items()} | {(name, split_by)}
    excluded: set[int] = set()
    notes = []
    for other, by in sorted(usual):
        path = _refs_file(root, other, by)
        if path.is_file():
            excluded |= {ref["image_id"] for ref in read_refs(path) if ref["split"] != "train"}
        else:
            notes.append(f"evaluation images of {other} ({by}) are not excluded: no {path}")
    return excluded, tuple(notes)


def _without(
    refs: list[dict[str, Any]], excluded: set[int], notes: tuple[str, ...]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    kept = [ref for ref in refs if ref["image_id"] not in excluded]
    dropped = {ref["image_id"] for ref in refs} & excluded
    note = (
        f"train: left out {len(dropped)} images ({len(refs) - len(kept)} objects) that stand in evaluation splits of the "
        "RefCOCO family"
    )
    return kept, (note, *notes)


def _instances(
    path: Path, refs: Iterable[Mapping[str, Any]]
) -> tuple[dict[int, str], dict[int, Any]]:
    """File stems by image and segmentations by object, of what `refs` mention."""
    content = read_json(path)
    wanted = {ref["ann_id"] for ref in refs}
    try:
        images = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        segmentations = {
            item["id"]: _compact(item["segmentation"])
            for item in content["annotations"]
            if item["id"] in wanted
        }
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not in COCO's format: {error!r}") from error
    return images, segmentations


def _compact(segmentation: Any) -> Any:
    """Polygons as arrays: lists of Python numbers take five times the memory."""
    if isinstance(segmentation, list):
        return [np.asarray(polygon, np.float64) for polygon in segmentation]
    return segmentation


def _sentences(
    refs: Iterable[Mapping[str, Any]],
    images: Mapping[int, str],
    segmentations: Mapping[int, Any],
    path: Path,
) -> dict[str, list[Expression]]:
    """Expressions by image. The file names in `refs` carry the object's number: those of the instances are right."""
    found: dict[str, list[Expression]] = {}
    for ref in refs:
        image, number = ref["image_id"], ref["ann_id"]
        if image not in images or number not in segmentations:
            missing = f"image {image}" if image not in images else f"object {number}"
            raise DataError(f"{path}: no {missing}, which reference {ref.get('ref_id')} means")
        for sentence in ref["sentences"]:
            found.setdefault(images[image], []).append(
                Expression(images[image], str(sentence["sent_id"]), sentence["sent"], (number,))
            )
    return found
