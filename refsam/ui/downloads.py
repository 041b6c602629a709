"""Downloads: the masks as a zip of PNGs and as COCO's run lengths."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RunLengths = dict[str, Any]


def encode_run_lengths(mask: np.ndarray) -> RunLengths:
    """A mask ``(H, W)`` bool as COCO's compressed run lengths: ``size`` (height, width) and ``counts``."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask.view(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}


def write_run_lengths(
    path: Path, result: dict[str, Any], codes: Sequence[Sequence[RunLengths]]
) -> None:
    """Write ``result`` (what ``result.json`` holds) as JSON, with each expression's ``segmentations``.

    Args:
        codes: for each expression, a run-length code per frame.
    """
    expressions = [
        expression | {"segmentations": list(frames)}
        for expression, frames in zip(result["expressions"], codes, strict=True)
    ]
    content = json.dumps(result | {"expressions": expressions}, ensure_ascii=False)
    path.write_text(content, encoding="utf-8")


def write_zip(path: Path, folder: Path, names: Sequence[str]) -> None:
    """Zip files and folders of ``folder``, in order of their names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for name in names:
            for file in sorted([folder / name, *(folder / name).rglob("*")]):
                if file.is_file():
                    archive.write(file, file.relative_to(folder))
