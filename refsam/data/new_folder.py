"""New folders of data, which appear as a whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refsam.data.dataset import DataError
from refsam.runtime.files import only_writer, own_name


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `out` at the end; after an error it is removed.

    Raises DataError where `out` exists, UserError while another process writes it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(out, wait=False):
        if out.exists():
            raise DataError(f"out: {out} exists, want a new folder")
        with staged_folder(out) as partial:
            yield partial


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into, which is renamed to `folder` at the end; after an error it is removed."""
    partial = own_name(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def place(source: Path, target: Path, copy: bool) -> None:
    """Put a folder at `target`: a symbolic link to it, or a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        shutil.copytree(source, target)
    else:
        target.symlink_to(source.resolve(), target_is_directory=True)
