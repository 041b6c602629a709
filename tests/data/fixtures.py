"""Tiny datasets in the exact formats of the real ones: rectangles that move, each a colour, on grey.

Every `write_*` fills a new folder and returns it. Object i of a video is the rectangle that `box_of` gives, in every frame
but those of `HIDDEN`; later objects lie on top.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

SIZE = (48, 64)  # height, width
COLOURS = {1: (220, 30, 30), 2: (30, 60, 220), 3: (30, 200, 60)}
EXPRESSIONS = {1: "the red box on the left", 2: "a blue box", 3: "the green one"}
# (object, position of the frame) in which the object is not to be seen.
HIDDEN = {(2, 1)}
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [0] * (3 * 252)


def box_of(number: int, time: int) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of an object's rectangle, the last two not included."""
    top, left = 4 + 9 * number + time, 6 * number + 3 * time
    return top, left, top + 12, left + 16


def numbers_at(time: int, objects: int) -> np.ndarray:
    """Object numbers (H, W) uint8."""
    numbers = np.zeros(SIZE, np.uint8)
    for number in range(1, objects + 1):
        if (number, time) not in HIDDEN:
            top, left, bottom, right = box_of(number, time)
            numbers[top:bottom, left:right] = number
    return numbers


def picture(numbers: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) uint8 of a map of object numbers."""
    pixels = np.full((*numbers.shape, 3), 128, np.uint8)
    for number, colour in COLOURS.items():
        pixels[numbers == number] = colour
    return pixels


def write_image(path: Path, pixels: np.ndarray) -> None:
    """A JPEG or PNG, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)  # a PNG has none


def write_numbers(path: Path, numbers: np.ndarray) -> None:
    """A palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers, "P")
    image.putpalette(PALETTE)
    image.save(path)


def write_json(path: Path, content: Any) -> None:
    """A JSON file in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_video(
    frames: Path, masks: Path | None, names: list[str], objects: int, suffix: str = ".jpg"
) -> None:
    """Frames, and maps of object numbers if there is a folder for them."""
    for time, name in enumerate(names):
        numbers = numbers_at(time, objects)
        write_image(frames / f"{name}{suffix}", picture(numbers))
        if masks is not None:
            write_numbers(masks / f"{name}.png", numbers)


def write_ref_youtube_vos(root: Path, frames: int = 4) -> Path:
    """Train: two videos, one with two objects of two expressions each. Valid: one video, its list names the test video too.

    Frame names have a step of 5; valid has no truth, and its expressions no `obj_id`, as in the original.
    """
    names = [f"{5 * index:05d}" for index in range(frames)]
    train = {"0062f687f1": 2, "00a23ccf53": 1}
    for video, objects in train.items():
        train_split = root / "train"
        write_video(
            train_split / "JPEGImages" / video, train_split / "Annotations" / video, names, objects
        )
    write_video(root / "valid/JPEGImages/0062f68aaa", None, names, 2)
    listed = {
        video: {
            "expressions": {
                str(2 * (number - 1) + again): {"exp": EXPRESSIONS[number], "obj_id": str(number)}
                for number in range(1, objects + 1)
                for again in (0, 1)
            },
            "frames": names,
        }
        for video, objects in train.items()
    }
    untold = {"0": {"exp": EXPRESSIONS[1]}, "1": {"exp": EXPRESSIONS[2]}}
    valid = {v: {"expressions": untold, "frames": names} for v in ("0062f68aaa", "00ffffffff")}
    test = {"00ffffffff": valid["00ffffffff"]}
    for split, videos in (("train", listed), ("valid", valid), ("test", test)):
        write_json(root / f"meta_expressions/{split}/meta_expressions.json", {"videos": videos})
    return root


def write_ref_youtube_vos_truth(root: Path, frames: int = 4) -> Path:
    """Adds the truth of the validation video, as maps of object numbers with `obj_id` in the list."""
    names = [f"{5 * index:05d}" for index in range(frames)]
    for time, name in enumerate(names):
        write_numbers(root / "valid/Annotations/0062f68aaa" / f"{name}.png", numbers_at(time, 2))
    path = root / "meta_expressions/valid/meta_expressions.json"
    content = json.loads(path.read_text())
    for video in content["videos"].values():
        for number, expression in video["expressions"].items():
            expression["obj_id"] = str(int(number) + 1)
    write_json(path, content)
    return root


def write_davis17(root: Path, frames: int = 4) -> Path:
    """DAVIS 2017 (`DAVIS/`) and the four text files (`davis_text_annotations/`), misspelt name and Latin-1 included."""
    names = [f"{index:05d}" for index in range(frames)]
    videos = {"classic-car": ("train", 1), "blackswan": ("val", 2), "goldfish": ("val", 1)}
    davis = root / "DAVIS"
    for video, (split, objects) in videos.items():
        masks = davis / "Annotations_unsupervised/480p" / video
        write_video(davis / "JPEGImages/480p" / video, masks, names, objects)
        path = davis / "ImageSets/2017" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(f"{video}\n")
    texts = root / "davis_text_annotations"
    texts.mkdir()
    for index, (name, encoding) in enumerate(
        (
            ("Davis17_annot1.txt", "utf-8"),
            ("Davis17_annot1_full_video.txt", "utf-8"),
            ("Davis17_annot2.txt", "latin-1"),
            ("Davis17_annot2_full_video.txt", "latin-1"),
        )
    ):
        lines = [
            f'{"clasic-car" if video == "classic-car" else video} {number} "{EXPRESSIONS[number]} caf\u00e9 {index}"'
            for video, (_, objects) in videos.items()
            for number in range(objects, 0, -1)
        ]
        (texts / name).write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return root


def write_ref_davis17(root: Path, frames: int = 4) -> Path:
    """The prepared layout, from `write_davis17` by the converter; the originals stay in `<root>-original`."""
    from refsam.data.ref_davis17 import prepare

    original = write_davis17(root.with_name(f"{root.name}-original"), frames)
    prepare(original / "DAVIS", original / "davis_text_annotations", root)
    return root


def write_mevis(root: Path, frames: int = 4) -> Path:
    """train and valid_u: a video with three objects, an expression about two of them, one about nothing; valid without truth."""
    names = [f"{index:05d}" for index in range(frames)]
    expressions: dict[str, dict[str, Any]] = {
        "0": {"exp": "the red box moving right", "obj_id": [1], "anno_id": [11]},
        "1": {"exp": "all that is not red", "obj_id": [2, 3], "anno_id": [12, 13]},
        "2": {"exp": "a dog that runs", "obj_id": [], "anno_id": []},
    }
    untold = {number: {"exp": entry["exp"]} for number, entry in expressions.items()}
    codes: dict[str, list[Any]] = {}
    for number in (1, 2, 3):
        masks = [numbers_at(time, 3) == number for time in range(frames)]
        codes[str(10 + number)] = [run_lengths(mask) if mask.any() else None for mask in masks]
    for split in ("train", "valid_u", "valid"):
        write_video(root / split / "JPEGImages/9f21474aca92", None, names, 3)
        entry = {"expressions": untold if split == "valid" else expressions, "frames": names}
        write_json(root / split / "meta_expressions.json", {"videos": {"9f21474aca92": entry}})
        if split != "valid":
            write_json(root / split / "mask_dict.json", codes)
    return root


def write_long_rvos(root: Path, frames: int = 4) -> Path:
    """train and valid: a video with two objects, masks only where they are seen, expressions of two types; test without truth."""
    names = [f"{index:05d}" for index in range(frames)]
    expressions = {
        "0": {"exp": "the red box", "obj_id": "1", "type": "static"},
        "1": {"exp": "a blue box that moves", "obj_id": 2, "type": "dynamic"},
    }
    for split in ("train", "valid", "test"):
        write_video(root / split / "JPEGImages/v001", None, names, 2)
        entry = {"expressions": expressions, "frames": names}
        write_json(root / split / "meta_expressions.json", {"videos": {"v001": entry}})
        for time, name in enumerate(names if split != "test" else []):
            for number in (1, 2):
                mask = numbers_at(time, 2) == number
                if mask.any():
                    path = root / split / f"Annotations/v001/{number}/{name}.png"
                    write_image(path, mask.astype(np.uint8) * 255)
    return root


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask (H, W) bool."""
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def write_refcoco(root: Path) -> Path:
    """RefCOCO, RefCOCO+ and RefCOCOg with five images, train2014 among them.

    RefCOCO (unc): images 1 and 2 in train, 3 in val, 4 in testA. RefCOCO+ (unc) has 2 in testB, RefCOCOg (umd) 5 in test,
    so of RefCOCO's train images only 1 is its own.
    """
    for image in range(1, 6):
        path = root / "train2014" / f"COCO_train2014_{image:012d}.jpg"
        write_image(path, picture(numbers_at(2 * (image % 2), 2)))
    splits = {
        ("refcoco", "unc"): {1: "train", 2: "train", 3: "val", 4: "testA"},
        ("refcoco+", "unc"): {1: "train", 2: "testB", 3: "val", 4: "testA"},
        ("refcocog", "umd"): {1: "train", 3: "val", 5: "test"},
        ("refcocog", "google"): {1: "train", 3: "val"},
    }
    for (name, split_by), images in splits.items():
        refs = [
            _reference(image, number, split) for image, split in images.items() for number in (1, 2)
        ]
        (root / name).mkdir(exist_ok=True)
        (root / name / f"refs({split_by}).p").write_bytes(python2_pickle(refs))
        write_json(root / name / "instances.json", _instances())
    return root


def _reference(image: int, number: int, split: str) -> dict[str, Any]:
    ref = 10 * image + number
    sentences = [
        {"sent_id": 2 * ref + again, "sent": text, "raw": text.upper(), "tokens": text.split()}
        for again, text in enumerate((EXPRESSIONS[number], f"box {number}"))
    ]
    return {
        "ref_id": ref,
        "ann_id": 100 * image + number,
        "category_id": 1,
        "image_id": image,
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",  # wrong on purpose, as in the original
        "split": split,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


def _instances() -> dict[str, Any]:
    """Object 1 as two polygons that overlap, object 2 as uncompressed run lengths."""
    images, annotations = [], []
    for image in range(1, 6):
        name = f"COCO_train2014_{image:012d}.jpg"
        images.append({"id": image, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        top, left, bottom, right = box_of(1, 2 * (image % 2))
        halves = [(left, left + 10), (left + 6, right)]
        polygons = [[a, top, b, top, b, bottom, a, bottom] for a, b in halves]
        mask = numbers_at(2 * (image % 2), 2) == 2
        runs = np.flatnonzero(np.diff(np.concatenate([[False], mask.ravel("F"), [False]])))
        counts = np.diff(np.concatenate([[0], runs, [mask.size]])).tolist()
        for number, segmentation in ((1, polygons), (2, {"size": list(SIZE), "counts": counts})):
            annotations.append(
                {
                    "id": 100 * image + number,
                    "image_id": image,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
    return {"images": images, "annotations": annotations}


class _Python2Pickler(pickle._Pickler):
    """Writes text as Python 2's `str`, as the original files have it."""

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, str):
            data = value.encode("latin-1")
            self.write(b"T" + len(data).to_bytes(4, "little") + data)  # type: ignore[attr-defined]
        else:
            super().save(value, save_persistent_id)  # type: ignore[misc]


def python2_pickle(content: Any) -> bytes:
    """Content as Python 2 would have pickled it."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def write_folder(root: Path, frames: int = 4) -> Path:
    """One's own videos: split train with two videos, one of PNG frames of which the last has no mask."""
    names = [f"frame{index}" for index in range(frames)]
    split = root / "train"
    write_video(split / "frames/kitchen", split / "masks/kitchen", names, 2)
    write_video(split / "frames/street", split / "masks/street", names, 1, ".png")
    (split / f"masks/street/{names[-1]}.png").unlink()
    rows = [
        "video,objects,text",
        f"kitchen,1,{EXPRESSIONS[1]}",
        'kitchen,1 2,"the boxes, both"',
        "kitchen,,a dog",
        f"street,1,{EXPRESSIONS[1]}",
    ]
    (split / "expressions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root
