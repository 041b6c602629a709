"""Zip files in the layouts that the benchmark servers expect."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

# The earliest date that a zip can hold: without the real one, equal masks give equal files.
_TIME = (1980, 1, 1, 0, 0, 0)


def write_submission(path: Path, predictions: Path, files: Iterable[str], top: str = "") -> int:
    """Zip `files` (paths below `predictions`) into `path`, below the folder `top` if there is one; returns their number.

    The zip appears as a whole. Raises FileNotFoundError for a file that is not there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        # PNGs are compressed already.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(files):
                entry = zipfile.ZipInfo(f"{top}/{name}" if top else name, _TIME)
                archive.writestr(entry, (predictions / name).read_bytes())
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count
