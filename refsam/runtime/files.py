"""Files in folders that several people and processes share: modes by the umask, one writer at a time."""

import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from refsam.errors import UserError

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold


def follow_umask(path: Path) -> None:
    """Give a file the mode that `open` gives a new one; safetensors and tempfile make theirs readable by their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that readers never see a partial file."""
    temporary = own_name(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def own_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process, on any machine, takes."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")


def write_zip(path: Path, folder: Path, files: Iterable[str], top: str = "") -> int:
    """Zip `files` (paths below `folder`) into `path`, below the folder `top` if there is one; returns their number.

    Nothing is compressed: PNGs are already. Equal files give equal zips. The zip appears as a whole. Raises FileNotFoundError for
    a file that is not there.
    """
    temporary, names = own_name(path), sorted(files)
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name in names:
                entry = zipfile.ZipInfo(f"{top}/{name}" if top else name, _ZIP_TIME)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, (folder / name).read_bytes())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(names)


class BusyError(UserError):
    """Another process is writing there."""


@contextmanager
def only_writer(path: Path, *, wait: bool, again: bool = False) -> Iterator[None]:
    """Hold the lock file `<path>.lock` within the block; it is released when the process ends in any way.

    `again` lets one thread hold it several times. If another process holds it, `wait` waits; else BusyError is raised.
    Raises UserError if it cannot be made.
    """
    from filelock import FileLock, Timeout

    name = path.with_name(f".{path.name}.lock")
    # If only its creator could open the lock, colleagues would be locked out forever.
    lock = FileLock(name, timeout=-1 if wait else 0, mode=0o666, is_singleton=again)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"{path} is being written by another process, which holds {name}: wait for it, or take another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{name}: cannot be made ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()
