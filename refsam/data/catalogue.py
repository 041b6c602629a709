"""The datasets by name."""

from importlib import import_module
from pathlib import Path
from typing import Any

from refsam.data.dataset import DataError, ReferringDataset

# Name -> the module that knows its files.
DATASETS = {
    "refcoco": "refcoco",
    "refcoco+": "refcoco",
    "refcocog": "refcoco",
    "ref-youtube-vos": "ref_youtube_vos",
    "ref-davis17": "ref_davis17",
    "mevis": "mevis",
    "long-rvos": "long_rvos",
    "folder": "folder",
}


def open_dataset(name: str, root: str | Path, split: str, **options: Any) -> ReferringDataset:
    """One split of a dataset that lies under `root`, laid out as docs/data.md says.

    `name` is one of `DATASETS`. The RefCOCO family takes `split_by` (unc, umd, google) and `exclude_shared`. Raises DataError
    for an unknown name or split, and where files are missing or not in their format.
    """
    if name not in DATASETS:
        raise DataError(f"dataset: got {name!r}, want one of {', '.join(DATASETS)}")
    if not Path(root).is_dir():
        raise DataError(f"{name}: no folder {root}")
    opened: ReferringDataset = import_module(f"refsam.data.{DATASETS[name]}").open_split(
        name, Path(root), split, **options
    )
    return opened
