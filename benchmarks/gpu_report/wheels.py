"""Carried wheels: a wheel is an archive, so a package that is missing here needs no installer."""

import importlib.util
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unpacked(folder: Path | None) -> Iterator[Path | None]:
    """A folder for `PYTHONPATH` that holds the packages of the folder's wheels; None if no folder is given.

    Raises `ValueError` if the folder has no wheels, or a wheel would write outside.
    """
    if folder is None:
        yield None
        return
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"--wheels: got {folder}, wanted a folder with wheels")
    with tempfile.TemporaryDirectory(prefix="refsam-wheels-") as site:
        for wheel in wheels:
            unpack(wheel, Path(site))
        yield Path(site)


def unpack(wheel: Path, site: Path) -> None:
    """Unpacks one wheel, its top-level packages that this machine has already left out: those are tested here."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        there = {top for top in {name.split("/")[0] for name in names} if is_installed(top)}
        for name in names:
            if not (site / name).resolve().is_relative_to(site.resolve()):
                raise ValueError(f"{wheel.name}: got a member {name!r} outside the archive")
            if name.split("/")[0] not in there:
                archive.extract(name, site)


def is_installed(top: str) -> bool:
    """Whether a top-level name of an archive is a package that can be imported without it."""
    name = top.removesuffix(".py")
    return name.isidentifier() and importlib.util.find_spec(name) is not None
