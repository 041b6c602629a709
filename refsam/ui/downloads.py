"""Downloads besides the overlay: the masks as a zip of PNGs."""

import zipfile
from collections.abc import Sequence
from pathlib import Path


def write_zip(path: Path, folder: Path, names: Sequence[str]) -> None:
    """Zip files and folders of ``folder``, in order of their names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for name in names:
            for file in sorted([folder / name, *(folder / name).rglob("*")]):
                if file.is_file():
                    archive.write(file, file.relative_to(folder))
